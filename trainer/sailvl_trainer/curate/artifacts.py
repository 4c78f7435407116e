"""The parts that curation leaves between its passes, under <output>/parts: what is there under its name is whole."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from sailvl_trainer.curate.items import Container, Item
from sailvl_trainer.curate.verify import Verified
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import decode

ROW_GROUP = 128
"""Items a row group of a listing: units of verification are whole row groups."""
MAX_UNIT = 4096
_TYPES = {str: pa.string(), str | None: pa.string(), bytes: pa.binary(), int: pa.int64(), int | None: pa.int64()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    split: Literal["shards", "held-out"]
    number: int
    samples: int

    @property
    def name(self) -> str:
        """Of the tar, without suffix."""
        return f"{self.number:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Some neighbouring items of one container."""

    container: int
    first: int
    """Within the container."""
    count: int
    item: int
    """Number of the first one, over all sources."""


class Parts:
    """Where everything is. `folder`: <output>/parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.containers = folder / "containers.json"
        self.rows = folder / "rows"
        self.decisions = folder / "decisions.parquet"
        self.plan = folder / "plan.parquet"
        self.shards = folder / "shards.json"

    def listing(self, container: int) -> Path:
        return self.folder / "items" / f"{container:06d}.parquet"

    def unit(self, number: int) -> Path:
        return self.rows / f"{number:06d}.parquet"

    def shard_info(self, shard: PlannedShard) -> Path:
        """Written once the shard is whole."""
        return self.folder / shard.split / f"{shard.name}.json"

    @cached_property
    def listed(self) -> tuple[Container, ...]:
        """All containers, once they are written down."""
        return decode(tuple[Container, ...], self.containers.read_bytes())

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units of verification, from the listings alone: the same on every rank and in every attempt."""
        return plan_units(self.listed, [pq.read_metadata(self.listing(c)).num_rows for c in range(len(self.listed))])


def plan_units(containers: tuple[Container, ...], sizes: list[int]) -> tuple[Unit, ...]:
    """Cut containers of so many items into units; a source's limit cuts off its later containers."""
    used: dict[str, int] = {}
    counts = []
    for container, size in zip(containers, sizes, strict=True):
        before = used.get(container.source, 0)
        counts.append(min(size, container.samples - before) if container.samples else size)
        used[container.source] = before + counts[-1]
    step = min(MAX_UNIT, max(ROW_GROUP, sum(counts) // 2000 // ROW_GROUP * ROW_GROUP))
    units: list[Unit] = []
    item = 0
    for number, count in enumerate(counts):
        for first in range(0, count, step):
            units.append(Unit(container=number, first=first, count=min(step, count - first), item=item + first))
        item += count
    return tuple(units)


def write_items(path: Path, items: Iterable[Item]) -> None:
    """A container's listing."""
    _write(path, _columns(Item, list(items)))


def read_items(path: Path, first: int, count: int) -> list[Item]:
    """Some items of a listing; `first` is a multiple of ROW_GROUP."""
    file = pq.ParquetFile(path)
    groups = range(first // ROW_GROUP, -(-(first + count) // ROW_GROUP))
    return to_items(file.read_row_groups(list(groups)).slice(0, count))


def to_items(table: pa.Table) -> list[Item]:
    """Rows of a listing, of verified rows, or of the plan."""
    return [Item(**row) for row in table.select([f.name for f in fields(Item)]).to_pylist()]


def write_rows(path: Path, first: int, items: list[Item], verified: list[Verified]) -> None:
    """A unit's items with what was found of them; `item` numbers them over all sources."""
    found = _columns(Verified, verified)
    kept = {name: column for name, column in _columns(Item, items).items() if name not in found}
    _write(path, {"item": pa.array(range(first, first + len(items)), pa.int64()), **kept, **found})


def _columns(type_: type, records: list[Any]) -> dict[str, pa.Array]:
    hints = get_type_hints(type_)
    columns = zip(*map(astuple, records), strict=True) if records else ([] for _ in fields(type_))
    return {f.name: pa.array(c, _TYPES[hints[f.name]]) for f, c in zip(fields(type_), columns, strict=True)}


def _write(path: Path, columns: dict[str, pa.Array]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=ROW_GROUP, compression="zstd")
    write_atomic(path, sink.getvalue())
