"""Background loops that continue after an unexpected error, as the controller's workers do.

One bad object, answer or message must not end the operator of all namespaces. Only lost leadership and a broken
configuration end the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.errors import CredentialsError, LeaseLost, SettingsError

log = logging.getLogger(__name__)

CountError = Callable[[str], None]
"""Called with the name of a loop for each unexpected error in it."""

FATAL_ERRORS = (LeaseLost, CredentialsError, SettingsError)
"""Errors that a loop doesn't survive."""
_RESTART_SECONDS = 1.0
"""Seconds between an unexpected error of a loop and its next start."""


def ignore_count(_loop: str) -> None:
    """Count no error."""


@contextmanager
def contain_errors(loop: str, count: CountError, *, subject: str) -> Iterator[None]:
    """Log and count an unexpected error in the work on one item of a loop, so that the other items get their turn.

    `subject`: names the item in the log. Input that can't be used is expected, so it is logged and not counted.
    """
    try:
        yield
    except FATAL_ERRORS:
        raise
    except DocumentError as error:
        log.warning("skipping %s: %s", subject, error, extra={"loop": loop})
    except Exception:
        count(loop)
        log.exception("internal error, skipping %s", subject, extra={"loop": loop})


async def keep_running(loop: str, run: Callable[[], Awaitable[None]], count: CountError) -> None:
    """Run a background loop until it returns or is cancelled; start it again after an unexpected error."""
    while True:
        try:
            return await run()
        except FATAL_ERRORS:
            raise
        except Exception:
            count(loop)
            log.exception("internal error, restarting in %.0f s", _RESTART_SECONDS, extra={"loop": loop})
        await asyncio.sleep(_RESTART_SECONDS)
