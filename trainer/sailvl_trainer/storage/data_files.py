"""Open files that people outside of the project wrote: raw images, captions, tars, benchmarks, prepared data sets.

A data set can hold anything that a file system holds: links to /proc/self/environ or to other data sets, named pipes
that block the reader forever, devices without an end. So each file is opened by `open_data_file`, which accepts only
regular files below given directories, and read with a limit of bytes. Links are followed, as the Hugging Face cache
consists of them; the file to which they lead must be below one of the directories, too.

On NFS, a file that another client replaces between two calls can't be read any more (ESTALE). It is opened once again
by its path, which leads to the new file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from sailvl_trainer.errors import StorageError
from sailvl_trainer.storage.files import translate_read_errors

if not hasattr(os, "O_PATH"):
    raise ImportError(
        "the trainer needs Linux, as it opens files with O_PATH and /proc/self/fd; run it there or in its image"
    )

T = TypeVar("T")
Reason = Literal["irregular_file", "outside_root", "too_large", "invalid_name"]
"""Why a file is refused."""


class RefusedFileError(ValueError):
    """A file of a data set is refused before any of it is used; the message describes it without its path."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class DataRoots:
    """Directories, or single files, that the files of a data set may be in, without links in their paths."""

    paths: tuple[str, ...]

    @classmethod
    def resolve(cls, *paths: Path | str) -> DataRoots:
        """Follow the links in paths that the user has configured, as far as they exist.

        Raises StorageError if a link can't be read at the moment; all files would seem to be outside of the roots.
        """
        return cls(tuple(_resolve(Path(path)) for path in paths))

    def contains(self, path: str) -> bool:
        """Return whether a path without links is one of the roots or below one."""
        return any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in self.paths)


def open_data_file(path: Path | str | bytes, roots: DataRoots) -> BinaryIO:
    """Open a regular file below the roots for reading; never block.

    Raises OSError, or RefusedFileError.
    """
    return _retry_if_stale(lambda: _open_once(path, roots))


def read_data_file(path: Path | str | bytes, roots: DataRoots, *, max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`. Raises OSError, or RefusedFileError, also for a larger file."""

    def read() -> bytes:
        with open_data_file(path, roots) as file:
            return read_limited(file, max_bytes)

    return _retry_if_stale(read)


def read_part(file: BinaryIO, path: Path | str | bytes, roots: DataRoots, *, offset: int, size: int) -> bytes:
    """Read at most `size` bytes from an offset of an open file below the roots. Raises OSError or RefusedFileError."""
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    with open_data_file(path, roots) as opened_again:
        opened_again.seek(offset)
        return opened_again.read(size)


def read_limited(file: BinaryIO, max_bytes: int) -> bytes:
    """Read a file to its end. Raises RefusedFileError if it has more than `max_bytes`, of which no more are read."""
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise RefusedFileError("too_large", f"larger than {max_bytes} bytes")
    data = file.read(size + 1)  # a buffer of max_bytes would be allocated before it is filled
    if len(data) > size:  # the file grows, or it is in a file system that doesn't know sizes
        data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise RefusedFileError("too_large", f"larger than {max_bytes} bytes")
    return data


def _retry_if_stale(read: Callable[[], T]) -> T:
    """Call a function that opens a file by its path, and once more if the file was replaced meanwhile."""
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return read()


def _resolve(path: Path) -> str:
    """Return a path without links; folders that don't exist, or that may not be entered, are left as they are."""
    try:
        with translate_read_errors(path):
            return os.path.realpath(path, strict=True)
    except OSError:
        return os.path.realpath(path)
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            return os.path.realpath(path)
        raise


def _open_once(path: Path | str | bytes, roots: DataRoots) -> BinaryIO:
    """Open a regular file below the roots.

    The file is first opened by its path only (O_PATH), which reads nothing and wakes no device. Type and location are
    those of the opened file, so that it can't be exchanged between the check and the reading.
    """
    handle = _open_path(path)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise RefusedFileError("irregular_file", "not a regular file")
        opened = f"/proc/self/fd/{handle}"
        if not roots.contains(os.readlink(opened)):
            raise RefusedFileError("outside_root", "leads to a file outside of the data set and of the storage")
        return open(os.open(opened, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        error.filename = os.fsdecode(path)  # instead of the descriptor's path
        raise
    finally:
        os.close(handle)


def _open_path(path: Path | str | bytes) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise RefusedFileError("invalid_name", f"not a valid file name: {error}") from error
