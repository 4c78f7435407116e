"""Let system calls for files of a name fail, as on an unavailable volume or in a process out of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

PASSING_ERRNOS = [
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ETIMEDOUT,
    errno.EACCES,
    errno.ENOMEM,
    errno.EHOSTUNREACH,
    errno.ECONNABORTED,
    errno.EREMOTEIO,
    errno.ENOLCK,
]
"""Errors after which a file may be intact."""
TYPICAL_ERRNOS = [errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT]
"""One error each of a volume, a process and a connection, for tests of code that shares its handling of errors."""
FILE_ERRNOS = [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG]
"""Errors of a path that leads to no file."""


def format_errno(number: object) -> str:
    """Return the name of an errno, for ids of test cases."""
    return errno.errorcode[number] if isinstance(number, int) else str(number)


def fail_calls(monkeypatch: pytest.MonkeyPatch, call: str, name: str, number: int) -> None:
    """Let `os.<call>` fail with an errno for paths that end with this name."""
    real = getattr(os, call)

    def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, int) and Path(os.fsdecode(path)).name == name:
            raise OSError(number, os.strerror(number), os.fsdecode(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, call, fail)
