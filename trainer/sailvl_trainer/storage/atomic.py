"""Write files so that a reader, or a crash, finds either the whole new file or the old one.

Every document on the shared storage is written with `write_atomic`. Large files (shards, weights) are written in place
and made durable with `sync_file` and `sync_directory` before the manifest that lists them is written.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from sailvl_trainer.storage.errors import translate_storage_errors


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
