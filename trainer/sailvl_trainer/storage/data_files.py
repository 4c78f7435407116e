"""Open files that people outside of the project wrote: raw images, captions, tars, benchmarks, prepared data sets.

A data set can hold anything that a file system holds: links to /proc/self/environ or to other data sets, named pipes
that block the reader forever, devices without an end. So each file is opened by `open_data_file`, which accepts only
regular files below given directories, and read with a limit of bytes. Links are followed, as the Hugging Face cache
consists of them; the file to which they lead must be below one of the directories, too.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from sailvl_trainer.errors import StorageError
from sailvl_trainer.storage.files import translate_read_errors

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

    The file is first opened by its path only (O_PATH), which reads nothing and wakes no device. Type and location are
    those of the opened file, so that it can't be exchanged between the check and the reading. Raises OSError, or
    RefusedFileError.
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


def read_data_file(path: Path | str | bytes, roots: DataRoots, *, max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`. Raises OSError, or RefusedFileError, also for a larger file."""
    with open_data_file(path, roots) as file:
        return read_limited(file, max_bytes)


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


def _open_path(path: Path | str | bytes) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise RefusedFileError("invalid_name", f"not a valid file name: {error}") from error
