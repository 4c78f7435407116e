"""Shards: plain WebDataset tars, each with an Arrow index of its rows, and a manifest over all.

Layout of a set: <set>/shards/{manifest.json, 00000.tar, 00000.arrow, …} and <set>/held-out/ likewise. Curation and
`make` write them; a reader maps both files and slices them, nothing is extracted or kept in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
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
from sailvl_trainer.data.samples import KEY, Message, Sample
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.atomic import sync_directory, write_atomic
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.errors import translate_storage_errors

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
        ("positions", pa.int32()),
        ("labels", pa.int32()),
    ]
)
"""Offsets and sizes in bytes within the tar; image_size 0: no picture. Width and height as shown. Positions without
those of the picture, and labels, as counted by the tokenizer of COUNTED_BY; -1: not counted."""
COUNTED_BY = b"sailvl.counted_by"
"""Key of the index's metadata: fingerprint of the tokenizer and template."""
OPEN_SHARDS = 256
"""Mapped at once, at most."""


class Counter(Protocol):
    """Counts a dialogue's positions and labels, without its picture's; see index.TokenCounter."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes a count."""

    def count(self, sample: Sample) -> tuple[int, int]:
        """Positions and labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    name: str
    """Without suffix."""
    samples: int
    bytes: int
    sha256: str
    """Of the tar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    shards: tuple[ShardInfo, ...]
    version: int = 1

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def write_manifest(directory: Path, shards: Iterable[ShardInfo]) -> Manifest:
    """The manifest, written last: a directory without one holds no set."""
    manifest = Manifest(shards=tuple(sorted(shards, key=lambda s: s.name)))
    write_atomic(directory / MANIFEST_FILE, encode(manifest))
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Raises DataError where there is none."""
    path = directory / MANIFEST_FILE
    try:
        return decode(Manifest, path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} holds no set of shards: {error}; name a curate stage or a prepared set"
        ) from error


def verify_shards(directory: Path) -> None:
    """Compare every tar with its hash in the manifest. Raises DataError that names the first that differs."""
    for info in read_manifest(directory).shards:
        path = directory / f"{info.name}.tar"
        if not path.exists() or _hash_file(path) != info.sha256:
            raise DataError(f"shard {path} is not the one in the manifest; copy the set again or curate it again")


class ShardWriter:
    """Writes one shard; it appears under its name only when the block ends without an exception."""

    def __init__(self, directory: Path, name: str, counter: Counter | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(f".{name}.tar.*"):
            stale.unlink(missing_ok=True)  # of a killed predecessor
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
            with suppress(OSError):  # a full disk: what is in its buffer can't be written still
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, sample: Sample, size: tuple[int, int] | None = None) -> None:
        """Append a sample; `size`: the picture's width and height as shown, read from it where not given.

        Raises ValueError for a key that is taken, or that WebDataset would split; StorageError for a full volume.
        """
        if not KEY.fullmatch(sample.key) or sample.key in self._keys:
            raise ValueError(f"sample key {sample.key!r}: a key has no dot and no slash and comes once in a shard")
        self._keys.add(sample.key)
        turns = [{"role": m.role, "content": m.content} for m in sample.messages]
        text = json.dumps({"messages": turns, "meta": sample.meta}, ensure_ascii=False, sort_keys=True).encode()
        positions, labels = (-1, -1) if self._counter is None else self._counter.count(sample)
        picture = self._write_image(sample, size)
        json_offset = self._add(f"{sample.key}.json", text)
        words = {"json_offset": json_offset, "json_size": len(text), "positions": positions, "labels": labels}
        self._rows.append({"key": sample.key, "suffix": sample.suffix} | picture | words)

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
        """Add a member; the offset of its bytes. Headers hold no time and no owner: equal samples, equal bytes."""
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        with translate_storage_errors(self.directory / self.name):
            self._tar.addfile(entry, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded

    def _publish(self) -> None:
        """The tar first: a writer whose temporary file its successor cleared fails before it changes anything."""
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
    """Random access to one shard's samples by row; safe to use from several threads."""

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
            raise DataError(f"shard {self.path}: {error}; copy the set again or curate it again") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def counted_by(self) -> str | None:
        """Fingerprint of the tokenizer that counted the positions, if one did."""
        found = (self._table.schema.metadata or {}).get(COUNTED_BY)
        return None if found is None else found.decode()

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, mapped."""
        values: np.ndarray = self._table.column(name).combine_chunks().to_numpy(zero_copy_only=True)
        return values

    def key(self, row: int) -> str:
        """The sample's name."""
        return str(self._table.column("key")[row].as_py())

    def image(self, row: int) -> bytes | None:
        """The encoded picture of a row."""
        return self._slice("image", row) or None

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises DataError that names shard and record."""
        try:
            text = json.loads(self._slice("json", row))
            messages = tuple(Message(role=m["role"], content=m["content"]) for m in text["messages"])
            suffix, meta = self._table.column("suffix")[row].as_py(), text["meta"]
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(row, error) from error
        return Sample(key=self.key(row), image=self.image(row), suffix=suffix, messages=messages, meta=meta)

    def error(self, row: int, cause: object) -> DataError:
        """An error about a record, to be raised."""
        return DataError(f"shard {self.path}, record {row} ({self.key(row)}): {cause}")

    def _slice(self, part: str, row: int) -> bytes:
        offset, size = (int(column[row]) for column in self._spans[part])
        data = bytes(self._data[offset : offset + size])
        if len(data) != size:
            raise self.error(row, f"the shard is cut off, {size} bytes at {offset} are not there")
        return data


class ShardPool:
    """The readers of many shards, the latest used ones open: a process may map only so many files."""

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
