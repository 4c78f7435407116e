"""Read and write the JSON documents on the shared storage, which may be damaged, of another version, or forged.

A power loss leaves empty or zeroed files, a full volume truncated ones, and every run of the same claim can write any.
So a document that can't be used counts as missing: it is set aside under another name, with a warning, and what it
described is computed anew. A document that can't be read at the moment is no such case; it raises StorageError. What
would not be read again is not written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sailvl_trainer.contract import SCHEMA_VERSION
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file, read_data_file
from sailvl_trainer.storage.files import format_bytes, sync_directory, translate_read_errors, write_atomic

T = TypeVar("T")
MAX_DOCUMENT_BYTES = 64 << 20
"""Largest size of a document: the manifest of 300,000 shards."""
MAX_LINES_BYTES = 4 << 30
"""Largest size of a file of JSON lines; a sparse file of any size takes no place, but hours to be read."""
MAX_NUMBER = 2**53
"""Largest number in a document; every JSON parser represents it exactly."""

logger = logging.getLogger(__name__)


class UnusableDocumentError(ValueError):
    """A document exists but can't be used; the message says why, without the document's path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIdentity:
    """Device, inode and time of modification of a file: it is the same file, unchanged, while these are equal."""

    device: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _VersionedDocument:
    schema_version: int = SCHEMA_VERSION


def read_document(
    type_: type[T], path: Path, roots: DataRoots, *, check: Callable[[T], str] = lambda document: ""
) -> T:
    """Return a document. `check` returns what is wrong with its values, or an empty string.

    Raises FileNotFoundError if it doesn't exist, UnusableDocumentError if it can't be used, StorageError if it can't be
    read.
    """
    try:
        with translate_read_errors(path):
            data = read_data_file(path, roots, max_bytes=MAX_DOCUMENT_BYTES)
        if "schema_version" in getattr(type_, "__dataclass_fields__", {}):
            _check_version(decode(_VersionedDocument, data).schema_version)
        document = decode(type_, data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UnusableDocumentError(str(error)) from error
    if problem := check(document):
        raise UnusableDocumentError(problem)
    return document


def write_document(
    path: Path, document: T, *, check: Callable[[T], str] = lambda document: "", advice: str = ""
) -> None:
    """Write a document that `read_document` with the same check accepts.

    `advice` says how to get a smaller one. Raises ConfigError if it has more than MAX_DOCUMENT_BYTES, ValueError if the
    check finds something wrong, StorageError if the volume is full or unavailable.
    """
    if problem := check(document):
        raise ValueError(f"{path} can't be written: {problem}")
    data = encode(document)
    if len(data) > MAX_DOCUMENT_BYTES:
        size, limit = format_bytes(len(data)), format_bytes(MAX_DOCUMENT_BYTES)
        raise ConfigError(f"{path} would have {size}, but at most {limit} are read" + (f"; {advice}" if advice else ""))
    write_atomic(path, data)


def find_document(
    type_: type[T],
    path: Path,
    roots: DataRoots,
    *,
    check: Callable[[T], str] = lambda document: "",
    should_set_aside: bool,
) -> T | None:
    """Return a document, or None, with a warning, if it can't be used; None without one if it doesn't exist.

    `should_set_aside`: whether to rename a document that can't be used; other runs' documents stay as they are. Raises
    StorageError if it can't be read.
    """
    identity = identify_file(path) if should_set_aside else None
    try:
        return read_document(type_, path, roots, check=check)
    except FileNotFoundError:
        return None
    except UnusableDocumentError as error:
        logger.warning("%s is not used: %s", path, error)
        if identity is not None:
            set_aside(path, identity=identity)
        return None


def iterate_lines(type_: type[T], path: Path, roots: DataRoots) -> Iterator[T]:
    """Yield the documents in a file of JSON lines, without lines that can't be used, as a killed process leaves them.

    A file that doesn't exist, that is no regular file, or that is larger than MAX_LINES_BYTES counts as empty. Raises
    StorageError if it can't be read.
    """
    with suppress(OSError, RefusedFileError), translate_read_errors(path), open_data_file(path, roots) as file:
        remaining = os.fstat(file.fileno()).st_size
        if remaining > MAX_LINES_BYTES:
            logger.warning("%s is not read: it has %d bytes, more than %d", path, remaining, MAX_LINES_BYTES)
            return
        while line := file.readline(min(remaining, MAX_DOCUMENT_BYTES)):
            remaining -= len(line)
            with suppress(ValueError):
                yield decode(type_, line)


def identify_file(path: Path) -> FileIdentity | None:
    """Return the identity of a file, or of a link itself; None if it doesn't exist. Raises StorageError."""
    try:
        with translate_read_errors(path):
            found = os.lstat(path)
    except OSError:
        return None
    return FileIdentity(device=found.st_dev, inode=found.st_ino, mtime_ns=found.st_mtime_ns)


def set_aside(path: Path, *, identity: FileIdentity | None = None, keep: bool = False) -> None:
    """Rename a file that can't be used, so that it can be examined; on a read-only volume it stays where it is.

    `identity` is that of the file before it was read: another process may have set it aside since and have written a
    file that can be used, which stays. None renames any file. `keep`: link it under the other name instead, because its
    existence has a meaning of its own.
    """
    target = path.with_name(f"{path.name}.unusable-{time.time_ns()}")
    with suppress(OSError):
        if identity is not None and identify_file(path) != identity:
            logger.info("%s was replaced by another process meanwhile; it stays in its place", path)
            return
        (os.link if keep else os.rename)(path, target)
        sync_directory(path.parent)
        logger.warning("%s was set aside as %s", path, target.name)


def resolve_below(root: Path, relative: str) -> Path:
    """Return the path of a directory that a document names relative to `root`.

    Raises UnusableDocumentError if the path is absolute, contains `..`, or leads out of `root` by a link.
    """
    pure = PurePosixPath(relative)
    if not relative or len(relative) > 4096 or "\0" in relative or pure.is_absolute() or ".." in pure.parts:
        raise UnusableDocumentError(f"path {relative[:100]!r} is not below {root}")
    if not DataRoots.resolve(root).contains(os.path.realpath(root / pure)):
        raise UnusableDocumentError(f"path {relative[:100]!r} leads out of {root}")
    return root / pure


def is_count(*numbers: int | float) -> bool:
    """Return whether all numbers are between 0 and MAX_NUMBER; NaN is not."""
    return all(0 <= number <= MAX_NUMBER for number in numbers)


def _check_version(version: Any) -> None:
    """Refuse another version before any other field is read, because its fields may mean something else."""
    if version != SCHEMA_VERSION:
        raise UnusableDocumentError(f"schema version {version}, but this trainer supports {SCHEMA_VERSION}")
