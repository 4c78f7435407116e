"""Errors of everything outside the pure core.

OperatorError
├── SettingsError          invalid flag or environment variable
├── CredentialsError       no credentials for a cluster
├── LeaseLost              another replica leads: this process must exit
├── NameConflict           an object with the needed name belongs to something else
└── ApiError               failed request to the API server
    ├── Unreachable        no response, or a malformed one
    ├── Unauthorized 401, Forbidden 403, NotFound 404, Conflict 409, Gone 410
    ├── Invalid            400, 413, 422 and other 4xx
    ├── TooManyRequests    429, with Retry-After
    └── ServerError        5xx
"""

# ruff: noqa: N818  # the names are the API server's reasons, which have no Error suffix

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sailvl_operator.api.untrusted import clean_line

_MAX_MESSAGE_LENGTH = 4096
"""Letters of an error of the API server; it may quote an admission webhook or the object."""


class OperatorError(Exception):
    """Base class of all errors of the operator."""


class SettingsError(OperatorError, ValueError):
    """Invalid setting. The message names the flag, its value and what to set instead."""


class CredentialsError(OperatorError):
    """Neither a kubeconfig nor a service account was found, or it is invalid."""


class LeaseLost(OperatorError):
    """The Lease is held, or may be held, by another replica; the process must exit without further writes."""


class NameConflict(OperatorError):
    """An object can't be created, because its name is taken by an object that this run doesn't own."""


class ApiError(OperatorError):
    """A request failed after its retries. `status`: HTTP status, 0 without a response; `reason`: reason of the
    metav1.Status."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Unreachable(ApiError):
    """No usable response: connection refused or reset, timeout, or malformed content."""


class Unauthorized(ApiError):
    """401: the credentials are invalid or have expired."""


class Forbidden(ApiError):
    """403: refused by RBAC, a quota or an admission policy."""


class NotFound(ApiError):
    """404: the object or the resource does not exist."""


class Conflict(ApiError):
    """409: the name exists, the resourceVersion is stale, or a UID precondition failed."""


class Gone(ApiError):
    """410: the resourceVersion of a watch or of a page has expired; list again."""


class Invalid(ApiError):
    """400, 413, 422 and other 4xx: the object is malformed, too large or violates its schema. An admission webhook that
    denies it may choose any of these codes."""


class TooManyRequests(ApiError):
    """429: the API server asks to wait for `retry_after` seconds."""

    retry_after: float = 0.0


class ServerError(ApiError):
    """5xx: the API server, or a webhook behind it, failed."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: TooManyRequests,
}


REFUSALS = (NameConflict, Forbidden, Invalid, ServerError)
"""Errors of creating an object that the user or an administrator has to resolve. A failing admission webhook shows as a
ServerError."""


def error_from_status(
    status: int, body: Mapping[str, Any], *, request: str, retry_after: str | None = None
) -> ApiError:
    """Build the error for an HTTP status. `body`: a metav1.Status, or empty; `retry_after`: the header of that name."""
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else Invalid)
    message = clean_line(str(body.get("message") or f"HTTP {status}"), _MAX_MESSAGE_LENGTH)
    error = kind(f"{request}: {message}", status=status, reason=str(body.get("reason", "")))
    if isinstance(error, TooManyRequests) and retry_after is not None and retry_after.isdecimal():
        error.retry_after = float(retry_after)
    return error
