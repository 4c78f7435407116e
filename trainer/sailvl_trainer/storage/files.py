"""Files on the shared storage: written durably, and with errors that say what is wrong with their volume.

A reader, or a crash, finds either the whole new file or the old one. Every document is written with `write_atomic`.
Large files (shards, weights) are written in place and made durable with `sync_file` and `sync_directory` before the
manifest that lists them is written.

Writes run inside `translate_storage_errors`, which turns errors of a full or unavailable volume into StorageError with
advice for the user; `rank/main.py` wraps a whole stage in it, for errors of libraries that the narrower blocks don't
cover. Reads that decide whether a file is used, replaced or deleted run inside `translate_read_errors`, which leaves
only the errors of FILE_ERRNOS: after any other one the file may be intact.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sailvl_trainer.errors import StorageError

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
UNAVAILABLE_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EROFS, errno.ESHUTDOWN, errno.EHOSTDOWN}
)
MISSING_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR})
FILE_ERRNOS = MISSING_ERRNOS | {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of a path that say that it leads to no file. Any other error of a read is a failure of the storage or of the
process, such as a timeout or too many open files, which passes."""
ERRNO_IN_TEXT = re.compile(r"(?:os error |errno\W{1,4})(\d+)", re.IGNORECASE)
"""Matches the error number in messages of libraries that raise their own exceptions: Rust, Arrow and DuckDB."""
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file through a temporary file, fsync and rename; missing parent directories are created.

    Raises StorageError if the volume is full or unavailable.
    """
    with translate_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with translate_storage_errors(path):  # reports the full volume before the cleanup frees space
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file to disk (fsync), so that content written by another library survives a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory to disk (fsync), so that files created or renamed in it survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def translate_storage_errors(path: Path, *, root: Path | None = None) -> Iterator[None]:
    """Raise StorageError in place of any error in the block that means that a volume is full or unavailable.

    `path` is named in the message if the error itself names no file. `root` is a directory that existed before: if a
    file is missing and `root` is missing too, its volume counts as unavailable.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        message = explain_storage_error(error, path, root=root)
        if message is None:
            raise
        raise StorageError(message) from error


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Raise StorageError in place of any OSError in the block but those of FILE_ERRNOS.

    So an OSError that leaves the block means that the file is missing or is no file, and never that it can't be read
    at the moment.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FILE_ERRNOS:
            raise
        raise StorageError(explain_storage_error(error, path) or describe_unreadable(path, error)) from error


def is_existing(path: Path) -> bool:
    """Return whether a file or directory exists. Raises StorageError if its volume doesn't show whether it does."""
    try:
        with translate_read_errors(path):
            path.stat()
    except OSError:
        return False
    return True


def list_names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none if it doesn't exist. Raises StorageError if it can't be listed."""
    try:
        with translate_read_errors(directory):
            return sorted(os.listdir(directory))
    except OSError:
        return []


def explain_storage_error(error: BaseException, path: Path, *, root: Path | None = None) -> str | None:
    """Return a message if the error, or one that caused it, is an error of a volume; else None."""
    for cause in _iter_causes(error):
        number, named = _read_errno(cause)
        if number in FULL_ERRNOS:
            return _describe_full(named or path, number)
        if number in UNAVAILABLE_ERRNOS:
            return describe_unavailable(named or path, number)
        if number in MISSING_ERRNOS and root is not None and not _exists(root):
            return describe_unavailable(root, number)
    return None


def describe_unavailable(path: Path, number: int) -> str:
    """Build the message for a volume that can't be used; `number` is the errno."""
    return (
        f"the volume of {path} is unavailable ({os.strerror(number)}); check that it is mounted and writable; "
        "the next attempt resumes from what is saved"
    )


def describe_unreadable(path: Path, error: OSError) -> str:
    """Build the message for a file that can't be read, although its volume is not known to be unavailable."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    named = _read_errno(error)[1]
    return (
        f"{named or path} can't be read ({reason}); check its permissions, the connection to its volume and the "
        "limits of the node; the next attempt resumes from what is saved"
    )


def format_bytes(number: int) -> str:
    """Format a number of bytes with a binary unit: 1536 as `1.5 KiB`."""
    size, unit = float(number), 0
    while size >= 1024 and unit + 1 < len(BYTE_UNITS):
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {BYTE_UNITS[unit]}" if unit else f"{number} B"


def _describe_full(path: Path, number: int) -> str:
    mount = _find_mount(path)
    try:
        usage = os.statvfs(mount)
    except OSError as error:
        return describe_unavailable(path, error.errno or errno.EIO)
    free = f"{format_bytes(usage.f_bavail * usage.f_frsize)} of {format_bytes(usage.f_blocks * usage.f_frsize)} free"
    if usage.f_files and not usage.f_favail:
        free += ", no free inodes"
    return (
        f"the volume {mount} is full: {free} ({os.strerror(number)}) while writing {path}; free space on it or enlarge "
        "it; the next attempt resumes from what is saved"
    )


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _read_errno(error: BaseException) -> tuple[int, Path | None]:
    """Return the errno of an error, 0 if it has none, and the file that it names."""
    if isinstance(error, OSError) and error.errno is not None:
        is_path = isinstance(error.filename, str | bytes | os.PathLike)
        return error.errno, Path(os.fsdecode(error.filename)) if is_path else None
    found = ERRNO_IN_TEXT.search(str(error))
    return int(found[1]) if found else 0, None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _find_mount(path: Path) -> Path:
    """Return the mount point of the volume that holds a path."""
    parent = path.absolute()
    while not os.path.ismount(parent):
        parent = parent.parent
    return parent
