"""Sizes and SHA-256 hashes of files, as the manifests of checkpoints, shards and exports hold them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file
from sailvl_trainer.storage.files import translate_read_errors

CHUNK_BYTES = 4 << 20
"""Bytes that are hashed between two calls of `on_chunk`."""
MAX_FILE_BYTES = 1 << 40
"""Largest size of a file in a manifest, 1 TiB: a sparse file of any size takes no place, but years to be read."""
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
"""Names of files in manifests: plain names, which can't lead to another directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileHash:
    """Size and hash of a file as it was written."""

    bytes: int
    sha256: str

    @property
    def is_valid(self) -> bool:
        """Whether a file can have this size and this hash."""
        return 0 <= self.bytes <= MAX_FILE_BYTES and SHA256.fullmatch(self.sha256) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedFile:
    """A file with what its manifest says about it."""

    path: Path
    expected: FileHash


def hash_file(
    path: Path,
    roots: DataRoots,
    on_chunk: Callable[[], None] = lambda: None,
    *,
    max_bytes: int = MAX_FILE_BYTES,
) -> FileHash:
    """Return size and hash of a regular file below the roots; `on_chunk` is called after each chunk.

    Raises OSError if it is missing, RefusedFileError if it is no regular file or has more than `max_bytes`,
    StorageError if it can't be read.
    """
    digest, size = hashlib.sha256(), 0
    with translate_read_errors(path), open_data_file(path, roots) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise RefusedFileError("too_large", f"larger than {max_bytes} bytes")
            on_chunk()
    return FileHash(bytes=size, sha256=digest.hexdigest())


def describe_difference(file: HashedFile, roots: DataRoots, on_chunk: Callable[[], None] = lambda: None) -> str:
    """Return how a file differs from its manifest, or an empty string; a file of another size isn't read.

    Raises StorageError if the file can't be read.
    """
    try:
        with translate_read_errors(file.path):
            size = file.path.stat().st_size
        found = FileHash(bytes=size, sha256="")
        if size == file.expected.bytes:
            found = hash_file(file.path, roots, on_chunk, max_bytes=size)
    except (OSError, RefusedFileError) as error:
        return str(error)
    if found == file.expected:
        return ""
    hashes = f" with SHA-256 {found.sha256[:12]}" if found.sha256 else ""
    return f"it has {found.bytes} bytes{hashes}, expected {file.expected.bytes} with {file.expected.sha256[:12]}"
