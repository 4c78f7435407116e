"""What a failed read or write says of its volume: it is full, or gone. Both are for people to mend; nothing is lost.

Used around whatever writes to the storage, and by rank.py around a whole stage for what is left.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sailvl_trainer.errors import StorageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
GONE = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EROFS, errno.ESHUTDOWN, errno.EHOSTDOWN})
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
IN_WORDS = re.compile(r"(?:os error |errno\W{1,4})(\d+)", re.IGNORECASE)
"""How libraries in Rust, C++ and DuckDB name the number in the text of an exception of their own."""


@contextmanager
def storage_errors(path: Path, *, root: Path | None = None) -> Iterator[None]:
    """Raises StorageError, which says what to do, in place of an error that means that a volume is full or gone.

    `path`: what is worked on. `root`: a folder that was there; where it is missing, its whole volume is.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        words = explain_storage_error(error, path, root=root)
        if words is None:
            raise
        raise StorageError(words) from error


def explain_storage_error(error: BaseException, path: Path, *, root: Path | None = None) -> str | None:
    """What is wrong with a volume, in words, if that is what an error means."""
    for cause in _chain(error):
        number, named = _read(cause)
        if number in FULL:
            return _describe_full(named or path, number)
        if number in GONE:
            return describe_unavailable(named or path, number)
        if number in ABSENT and root is not None and not _is_there(root):
            return describe_unavailable(root, number)
    return None


def describe_unavailable(path: Path, number: int) -> str:
    """In words for people; `number`: the system's, of the error."""
    return (
        f"the volume of {path} is gone or broken ({os.strerror(number)}); see that it is mounted, writable and whole; "
        "the next attempt goes on from what is saved"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _read(error: BaseException) -> tuple[int, Path | None]:
    """The system's number of an error, 0 for none, and the file that it names."""
    if isinstance(error, OSError) and error.errno is not None:
        is_path = isinstance(error.filename, str | bytes | os.PathLike)
        return error.errno, Path(os.fsdecode(error.filename)) if is_path else None
    found = IN_WORDS.search(str(error))
    return int(found[1]) if found else 0, None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _describe_full(path: Path, number: int) -> str:
    mount = _find_mount(path)
    try:
        found = os.statvfs(mount)
    except OSError as error:
        return describe_unavailable(path, error.errno or errno.EIO)
    free = f"{format_bytes(found.f_bavail * found.f_frsize)} of {format_bytes(found.f_blocks * found.f_frsize)} free"
    if found.f_files and not found.f_favail:
        free += ", and no inode for another file"
    return (
        f"the volume {mount} is full: {free} ({os.strerror(number)}) while writing {path}; make room on it or make it "
        "larger; the next attempt goes on from what is saved"
    )


def _find_mount(path: Path) -> Path:
    """Where the volume of a path is mounted."""
    place = path.absolute()
    while not os.path.ismount(place):
        place = place.parent
    return place


def format_bytes(number: int) -> str:
    """1536 as 1.5 KiB."""
    size, unit = float(number), 0
    while size >= 1024 and unit + 1 < len(UNITS):
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{number} B"
