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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.data.images import read_size
from sailvl_trainer.data.samples import SAMPLE_KEY, Message, Sample, decode_dialogue, encode_dialogue
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.files import sync_directory, translate_storage_errors, write_atomic

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("suffix", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_sha256", pa.binary()),
        ("text_tokens", pa.int32()),
        ("loss_tokens", pa.int32()),
    ]
)
"""Columns of an index. Offsets and sizes are bytes within the tar; image_size is 0 without an image. Width and height
are pixels of the upright image. `text_tokens` (tokens without image tokens) and `loss_tokens` were counted by the
tokenizer named in COUNTED_BY; -1 if they weren't counted."""
COUNTED_BY = b"sailvl.counted_by"
"""Metadata key of an index: the fingerprint of the tokenizer and chat template that counted its tokens."""
OPEN_SHARDS = 256
"""Maximum number of shards that are mapped at once."""


class SampleCounter(Protocol):
    """Counts the tokens of a dialogue, without image tokens; implemented by encoder.TokenCounter."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a count depends on."""

    def count(self, messages: tuple[Message, ...], *, has_image: bool) -> tuple[int, int]:
        """Return the number of text tokens and the number of loss tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """A shard's entry in the manifest."""

    name: str
    """File name without suffix."""
    samples: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """The shards of a directory, in the order of their samples."""

    shards: tuple[ShardInfo, ...]
    version: int = 1

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


def write_shard_manifest(directory: Path, shards: Iterable[ShardInfo]) -> ShardManifest:
    """Write the manifest, after all shards: a directory without one holds no set."""
    manifest = ShardManifest(shards=tuple(sorted(shards, key=lambda s: s.name)))
    write_atomic(directory / MANIFEST_FILE, encode(manifest))
    return manifest


def read_shard_manifest(directory: Path) -> ShardManifest:
    """Return the manifest of a directory. Raises DataError if it has none."""
    path = directory / MANIFEST_FILE
    try:
        return decode(ShardManifest, path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} contains no data set: {error}; set the output of a curate stage or a prepared data set"
        ) from error


def verify_shards(directory: Path) -> None:
    """Compare every tar with its hash in the manifest. Raises DataError that names the first one that differs."""
    for info in read_shard_manifest(directory).shards:
        path = directory / f"{info.name}.tar"
        if not path.exists() or _hash_file(path) != info.sha256:
            raise DataError(f"shard {path} does not match the hash in the manifest; copy or curate the data set again")


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
        digest, target = _hash_file(self._temporary), self.directory / f"{self.name}.tar"
        os.replace(self._temporary, target)
        sync_directory(self.directory)
        schema = SCHEMA if self._counter is None else SCHEMA.with_metadata({COUNTED_BY: self._counter.fingerprint})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        write_atomic(self.directory / f"{self.name}.arrow", sink.getvalue().to_pybytes())
        self.info = ShardInfo(name=self.name, samples=len(self._rows), bytes=target.stat().st_size, sha256=digest)


class ShardReader:
    """Random access to one shard's samples by row. Text and image are read separately. Thread-safe."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.tar"
        try:
            with pa.memory_map(str(directory / f"{name}.arrow")) as source:
                self._table = pa.ipc.open_file(source).read_all()
            with pa.memory_map(str(self.path)) as source:
                self._data = memoryview(source.read_buffer())
            self._spans = {
                part: (self.column(f"{part}_offset"), self.column(f"{part}_size")) for part in ("image", "json")
            }
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(f"shard {self.path}: {error}; copy or curate the data set again") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def counted_by(self) -> str | None:
        """Fingerprint of the tokenizer that counted the tokens; None if they weren't counted."""
        found = (self._table.schema.metadata or {}).get(COUNTED_BY)
        return None if found is None else found.decode()

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column as a read-only memory-mapped array of shape (R,)."""
        values: np.ndarray = self._table.column(name).combine_chunks().to_numpy(zero_copy_only=True)
        return values

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
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(row, error) from error

    def error(self, row: int, cause: object) -> DataError:
        """Return the error that names this shard and record, for the caller to raise."""
        return DataError(f"shard {self.path}, record {row} ({self.key(row)}): {cause}")

    def _slice(self, part: str, row: int) -> bytes:
        offset, size = (int(column[row]) for column in self._spans[part])
        data = bytes(self._data[offset : offset + size])
        if len(data) != size:
            raise self.error(row, f"the shard is truncated: {size} bytes at offset {offset} are missing")
        return data


class ShardPool:
    """LRU cache of the readers of many shards, since a process can map only a limited number of files. Thread-safe."""

    def __init__(self, shards: Sequence[tuple[Path, str]], limit: int = OPEN_SHARDS) -> None:
        self._shards, self._limit = shards, limit
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> ShardReader:
        with self._lock:
            reader = self._open.pop(number, None) or ShardReader(*self._shards[number])
            self._open[number] = reader
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
            return reader


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
