"""Shards: plain WebDataset tars, each with an Arrow index of its rows, and a manifest of all shards.

Layout of a set: <set>/shards/{manifest.json, 00000.tar, 00000.arrow, …} and <set>/held-out/ likewise. Curation and the
demo write them. A reader memory-maps both files and slices them; nothing is extracted.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sailvl_trainer.data.images import read_size
from sailvl_trainer.data.samples import SAMPLE_KEY, Message, Sample, decode_dialogue, encode_dialogue
from sailvl_trainer.data.shard_index import (
    COUNTED_BY,
    SCHEMA,
    InvalidIndexError,
    find_invalid_row,
    map_file,
    read_column,
    read_index,
)
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError
from sailvl_trainer.storage.files import sync_directory, translate_read_errors, translate_storage_errors, write_atomic
from sailvl_trainer.storage.hashes import hash_file
from sailvl_trainer.storage.shard_manifest import ShardInfo

OPEN_SHARDS = 256
"""Maximum number of shards that are mapped at once."""
MAX_KEY_LENGTH = 100
"""Longest part of a sample's key in messages."""


class SampleCounter(Protocol):
    """Counts the tokens of a dialogue, without image tokens; implemented by encoder.TokenCounter."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a count depends on."""

    def count(self, messages: tuple[Message, ...], *, has_image: bool) -> tuple[int, int]:
        """Return the number of text tokens and the number of loss tokens."""


class ShardWriter:
    """Context manager that writes one shard, which appears under its name only if the block raises no exception."""

    def __init__(self, directory: Path, name: str, counter: SampleCounter | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(f".{name}.tar.*"):
            stale.unlink(missing_ok=True)  # left by a killed writer
        self.directory, self.name = directory, name
        self.info: ShardInfo | None = None
        self._counter = counter
        self._temporary = directory / f".{name}.tar.{uuid.uuid4().hex}"
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                with translate_storage_errors(self.directory / self.name):
                    self._tar.close()
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._publish()
        finally:
            with suppress(OSError):  # on a full disk, flushing the buffer fails again
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, sample: Sample, size: tuple[int, int] | None = None) -> None:
        """Append a sample; `size` is the upright image's width and height, read from its header if not given.

        Raises ValueError for a duplicate key or one that WebDataset would split; StorageError if the volume is full.
        """
        if not SAMPLE_KEY.fullmatch(sample.key) or sample.key in self._keys:
            raise ValueError(f"sample key {sample.key!r}: keys must be unique in a shard, without dots and slashes")
        self._keys.add(sample.key)
        text = encode_dialogue(sample)
        counts = self._count(sample)
        image = self._write_image(sample, size)
        dialogue = {"json_offset": self._add(f"{sample.key}.json", text), "json_size": len(text)}
        self._rows.append({"key": sample.key, "suffix": sample.suffix} | image | dialogue | counts)

    def _count(self, sample: Sample) -> dict[str, int]:
        text_tokens, loss_tokens = -1, -1
        if self._counter is not None:
            text_tokens, loss_tokens = self._counter.count(sample.messages, has_image=sample.image is not None)
        return {"text_tokens": text_tokens, "loss_tokens": loss_tokens}

    def _write_image(self, sample: Sample, size: tuple[int, int] | None) -> dict[str, Any]:
        if sample.image is None:
            return {"image_offset": 0, "image_size": 0, "width": 0, "height": 0, "image_sha256": b""}
        width, height = size if size is not None else read_size(sample.image)
        return {
            "image_offset": self._add(f"{sample.key}.{sample.suffix}", sample.image),
            "image_size": len(sample.image),
            "width": width,
            "height": height,
            "image_sha256": hashlib.sha256(sample.image).digest(),
        }

    def _add(self, name: str, data: bytes) -> int:
        """Add a member and return the offset of its data.

        Headers hold neither time nor owner, so that equal samples give equal tars.
        """
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        with translate_storage_errors(self.directory / self.name):
            self._tar.addfile(entry, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded

    def _publish(self) -> None:
        """Rename the tar, then write the index.

        If a later writer has deleted the temporary file, this one fails at the rename, before it changes anything.
        """
        tar = hash_file(self._temporary, DataRoots.resolve(self.directory))
        target = self.directory / f"{self.name}.tar"
        os.replace(self._temporary, target)
        sync_directory(self.directory)
        schema = SCHEMA if self._counter is None else SCHEMA.with_metadata({COUNTED_BY: self._counter.fingerprint})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        index = sink.getvalue().to_pybytes()
        write_atomic(self.directory / f"{self.name}.arrow", index)
        self.info = ShardInfo(
            name=self.name,
            samples=len(self._rows),
            bytes=tar.bytes,
            sha256=tar.sha256,
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )


class ShardReader:
    """Random access to one shard's samples by row. Text and image are read separately. Thread-safe."""

    def __init__(self, directory: Path, name: str, roots: DataRoots | None = None) -> None:
        """`roots`: directories that files may be in; by default the shard's.

        Raises DataError for a damaged shard, StorageError if it can't be read.
        """
        self.path = directory / f"{name}.tar"
        roots = roots or DataRoots.resolve(directory)
        try:
            with translate_read_errors(self.path):
                self._table = read_index(directory / f"{name}.arrow", roots)
                self._data = memoryview(map_file(self.path, roots))
        except (OSError, RefusedFileError, InvalidIndexError) as error:
            raise DataError(f"shard {self.path}: {error}; copy or curate the data set again") from error
        if (invalid := find_invalid_row(self._table, len(self._data))) is not None:
            raise self.error(*invalid)
        self._spans = {part: (self.column(f"{part}_offset"), self.column(f"{part}_size")) for part in ("image", "json")}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def counted_by(self) -> str | None:
        """Fingerprint of the tokenizer that counted the tokens; None if they weren't counted."""
        found = (self._table.schema.metadata or {}).get(COUNTED_BY)
        return None if found is None else found.decode()

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column as a read-only memory-mapped array of shape (R,)."""
        return read_column(self._table, name)

    def key(self, row: int) -> str:
        """Return the sample's key."""
        return str(self._table.column("key")[row].as_py())

    def messages(self, row: int) -> tuple[Message, ...]:
        """Return a row's dialogue; its image isn't read. Raises DataError that names shard and record."""
        return self._dialogue(row)[0]

    def image(self, row: int) -> bytes | None:
        """Return a row's encoded image, None without one. Raises DataError that names shard and record."""
        return self._slice("image", row) or None

    def sample(self, row: int) -> Sample:
        """Return a row's whole sample, text and image. Raises DataError that names shard and record."""
        messages, meta = self._dialogue(row)
        suffix = self._table.column("suffix")[row].as_py()
        return Sample(key=self.key(row), image=self.image(row), suffix=suffix, messages=messages, meta=meta)

    def _dialogue(self, row: int) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Return a row's messages and metadata."""
        try:
            return decode_dialogue(self._slice("json", row))
        except ValueError as error:
            raise self.error(row, error) from error

    def error(self, row: int, cause: object) -> DataError:
        """Return the error that names this shard and record, for the caller to raise."""
        return DataError(f"shard {self.path}, record {row} ({self.key(row)[:MAX_KEY_LENGTH]}): {cause}")

    def _slice(self, part: str, row: int) -> bytes:
        offset, size = (int(column[row]) for column in self._spans[part])
        return bytes(self._data[offset : offset + size])


class ShardPool:
    """LRU cache of the readers of many shards, since a process can map only a limited number of files. Thread-safe."""

    def __init__(
        self, shards: Sequence[tuple[Path, str]], limit: int = OPEN_SHARDS, *, roots: DataRoots | None = None
    ) -> None:
        """`roots`: directories that files may be in; by default each shard's."""
        self._shards, self._limit, self._roots = shards, limit, roots
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> ShardReader:
        with self._lock:
            reader = self._open.pop(number, None) or ShardReader(*self._shards[number], self._roots)
            self._open[number] = reader
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
            return reader
