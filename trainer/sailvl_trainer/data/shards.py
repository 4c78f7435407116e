"""Shards: plain WebDataset tars, each with an Arrow index of its rows, and a manifest over all.

Layout of a set: <set>/shards/{manifest.json, 00000.tar, 00000.arrow, …} and <set>/held-out/ likewise. Nothing is
extracted: a reader maps a tar and slices it by the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.data.samples import Message, Sample
from sailvl_trainer.runtime.documents import decode, encode, sync_directory, write_atomic
from sailvl_trainer.runtime.errors import DataError

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
    ]
)
"""Offsets and sizes in bytes within the tar; image_size 0: no picture."""


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


class ShardWriter:
    """Writes one shard; it appears under its name only when the block ends without an exception."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.name = directory, name
        self.info: ShardInfo | None = None
        self._temporary = directory / f".{name}.tar.{os.getpid()}"
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is not None:
            self._temporary.unlink()
            return
        self._close()

    def write(self, sample: Sample, size: tuple[int, int] = (0, 0)) -> None:
        """Append a sample; `size`: the picture's width and height as shown."""
        image_offset, image_size = 0, 0
        if sample.image is not None:
            image_offset = self._add(f"{sample.key}.{sample.suffix}", sample.image)
            image_size = len(sample.image)
        turns = [{"role": m.role, "content": m.content} for m in sample.messages]
        text = json.dumps({"messages": turns, "meta": sample.meta}, ensure_ascii=False, sort_keys=True).encode()
        row = {
            "key": sample.key,
            "image_offset": image_offset,
            "image_size": image_size,
            "json_offset": self._add(f"{sample.key}.json", text),
            "json_size": len(text),
            "suffix": sample.suffix,
            "width": size[0],
            "height": size[1],
        }
        self._rows.append(row)

    def _add(self, name: str, data: bytes) -> int:
        """Add a member; the offset of its bytes. Headers hold no time and no owner: equal samples, equal bytes."""
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self._tar.addfile(entry, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded

    def _close(self) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        write_atomic(self.directory / f"{self.name}.arrow", sink.getvalue().to_pybytes())
        target = self.directory / f"{self.name}.tar"
        with self._temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self._temporary, target)
        sync_directory(self.directory)
        self.info = ShardInfo(name=self.name, samples=len(self._rows), bytes=target.stat().st_size, sha256=digest)


class ShardReader:
    """Random access to one shard's samples by row."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.tar"
        try:
            with pa.memory_map(str(directory / f"{name}.arrow")) as source:
                self.rows: list[Mapping[str, Any]] = pa.ipc.open_file(source).read_all().to_pylist()
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"shard {self.path}: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int) -> bytes | None:
        """The encoded picture of a row."""
        entry = self.rows[row]
        return self._slice(entry["image_offset"], entry["image_size"]) if entry["image_size"] else None

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises DataError that names shard and record."""
        entry = self.rows[row]
        try:
            text = json.loads(self._slice(entry["json_offset"], entry["json_size"]))
            messages = tuple(Message(role=m["role"], content=m["content"]) for m in text["messages"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"shard {self.path}, record {row} ({entry['key']}): {error}") from error
        return Sample(
            key=entry["key"], image=self.image(row), suffix=entry["suffix"], messages=messages, meta=text["meta"]
        )

    def _slice(self, offset: int, size: int) -> bytes:
        data = self._map[offset : offset + size]
        if len(data) != size:
            raise DataError(f"shard {self.path} is cut off: {size} bytes at {offset} are not there")
        return data
