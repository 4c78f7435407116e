"""Everything that can go wrong outside the pure core.

OperatorError
├── SettingsError          a flag or variable that can't work
├── CredentialsError       no way into a cluster
├── LostLease              another replica leads: this process must end
├── NameConflict              an object of a child's name belongs to someone else
└── ApiError               the API server's answer, or none
    ├── Unreachable        no answer
    ├── Unauthorized 401, Forbidden 403, NotFound 404, Conflict 409, Gone 410, Invalid 422
    ├── TooManyRequests    429, with the seconds it asks for
    └── ServerError        5xx
"""

# ruff: noqa: N818  # the names say what is the matter; an Error at each end would add nothing

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class OperatorError(Exception):
    """Base of all."""


class SettingsError(OperatorError, ValueError):
    """Says which flag or variable was given what, and what to give instead."""


class CredentialsError(OperatorError):
    """Neither a kubeconfig nor a service account leads to a cluster."""


class LostLease(OperatorError):
    """The process must end before it writes anything more."""


class NameConflict(OperatorError):
    """A child can't be made: its name is in use by an object that isn't this run's."""


class ApiError(OperatorError):
    """A request failed for good, after its retries."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Unreachable(ApiError):
    """No answer: connection refused, reset, or timed out."""


class Unauthorized(ApiError):
    """401: the credentials are unknown or have expired."""


class Forbidden(ApiError):
    """403: RBAC, a quota or an admission policy says no."""


class NotFound(ApiError):
    """The API server answered 404: the object doesn't exist."""


class Conflict(ApiError):
    """409: the name exists, the resourceVersion is old, or a uid precondition failed."""


class Gone(ApiError):
    """410: the resourceVersion of a watch or a page is too old; list again."""


class Invalid(ApiError):
    """422: the object breaks its schema."""


class TooManyRequests(ApiError):
    """429: the server asks for `retry_after` seconds of patience."""

    retry_after: float = 0.0


class ServerError(ApiError):
    """The API server answered 5xx."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
}


REFUSALS = (NameConflict, Forbidden, Invalid, ServerError)
"""What a child's creation meets and a person must mend; a webhook that is down shows as a ServerError."""


def api_error(status: int, body: Mapping[str, Any], *, request: str, retry_after: str | None = None) -> ApiError:
    """The error of an HTTP status; `body` is a metav1.Status or empty."""
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    words = body.get("message") or f"HTTP {status}"
    error = kind(f"{request}: {words}", status=status, reason=str(body.get("reason", "")))
    if isinstance(error, TooManyRequests) and retry_after is not None and retry_after.isdigit():
        error.retry_after = float(retry_after)
    return error
