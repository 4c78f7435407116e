"""The artifacts of curation: files below <output>/artifacts by which its steps pass on results and resume.

Every file is written atomically; resume.py decides whether one of an earlier attempt is used. Used by all steps of
curation.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from sailvl_trainer.curate.items import Item, SourcePartition
from sailvl_trainer.curate.verify import VerifiedItem
from sailvl_trainer.storage.codec import decode
from sailvl_trainer.storage.files import write_atomic

ROW_GROUP_SIZE = 128
"""Items per row group of an item list. Work units consist of whole row groups."""
WRITE_BATCH = 32 * ROW_GROUP_SIZE
"""Items that are written at once."""
MAX_UNIT_SIZE = 4096
TARGET_UNITS = 2000
"""Number of work units beyond which their size grows."""
ARROW_TYPES = {str: pa.string(), str | None: pa.string(), bytes: pa.binary(), int: pa.int64(), int | None: pa.int64()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """A shard that is to be written; its samples are in the plan."""

    split: Literal["shards", "held-out"]
    number: int
    samples: int

    @property
    def name(self) -> str:
        """File name of the shard without its suffix."""
        return f"{self.number:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """Consecutive items of one partition that one rank verifies together."""

    partition: int
    first: int
    """Index of the first item within the partition; a multiple of ROW_GROUP_SIZE."""
    count: int
    first_item: int
    """Number of the first item over all sources."""


class CurationArtifacts:
    """Paths of the artifacts below `folder`, and the work units that follow from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partitions_file = folder / "partitions.json"
        self.rows_folder = folder / "rows"
        self.decisions = folder / "decisions.parquet"
        self.plan = folder / "plan.parquet"
        self.shards = folder / "shards.json"

    def items_file(self, partition: int) -> Path:
        """Return the path of a partition's item list."""
        return self.folder / "items" / f"{partition:06d}.parquet"

    def rows_file(self, unit: int) -> Path:
        """Return the path of a work unit's verified items."""
        return self.rows_folder / f"{unit:06d}.parquet"

    def shard_info_file(self, shard: PlannedShard) -> Path:
        """Return the path of a shard's ShardInfo, which exists when the shard is complete."""
        return self.folder / shard.split / f"{shard.name}.json"

    @cached_property
    def partitions(self) -> tuple[SourcePartition, ...]:
        """All partitions; available after step 1."""
        return decode(tuple[SourcePartition, ...], self.partitions_file.read_bytes())

    @cached_property
    def units(self) -> tuple[WorkUnit, ...]:
        """All work units; available after step 2. They are the same on every rank and in every attempt."""
        sizes = [pq.read_metadata(self.items_file(number)).num_rows for number in range(len(self.partitions))]
        return plan_units(self.partitions, sizes)


def plan_units(partitions: tuple[SourcePartition, ...], sizes: list[int]) -> tuple[WorkUnit, ...]:
    """Divide partitions with the given numbers of items into work units, within each source's limit of samples."""
    counts = _limit_counts(partitions, sizes)
    unit_size = min(MAX_UNIT_SIZE, max(ROW_GROUP_SIZE, sum(counts) // TARGET_UNITS // ROW_GROUP_SIZE * ROW_GROUP_SIZE))
    units: list[WorkUnit] = []
    item = 0
    for number, count in enumerate(counts):
        for first in range(0, count, unit_size):
            size = min(unit_size, count - first)
            units.append(WorkUnit(partition=number, first=first, count=size, first_item=item + first))
        item += count
    return tuple(units)


def _limit_counts(partitions: tuple[SourcePartition, ...], sizes: list[int]) -> list[int]:
    """Return how many items of each partition are used; the limit of a source cuts its later partitions."""
    used: dict[str, int] = {}
    counts = []
    for partition, size in zip(partitions, sizes, strict=True):
        before = used.get(partition.source, 0)
        counts.append(min(size, partition.samples - before) if partition.samples else size)
        used[partition.source] = before + counts[-1]
    return counts


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write the item list of a partition; only the compressed list is held in memory as a whole."""
    schema = pa.table(_build_columns(Item, [])).schema
    remaining, sink = iter(items), io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        while batch := list(islice(remaining, WRITE_BATCH)):
            writer.write_table(pa.table(_build_columns(Item, batch)), row_group_size=ROW_GROUP_SIZE)
    write_atomic(path, sink.getvalue())


def read_items(path: Path, first: int, count: int) -> list[Item]:
    """Read `count` items of an item list; `first` is a multiple of ROW_GROUP_SIZE."""
    file = pq.ParquetFile(path)
    groups = range(first // ROW_GROUP_SIZE, -(-(first + count) // ROW_GROUP_SIZE))
    return parse_items(file.read_row_groups(list(groups)).slice(0, count))


def parse_items(table: pa.Table) -> list[Item]:
    """Return the items of a table that has their columns: an item list, verified items, or the plan."""
    return [Item(**row) for row in table.select([f.name for f in fields(Item)]).to_pylist()]


def write_verified_items(path: Path, first_item: int, items: list[Item], verified: list[VerifiedItem]) -> None:
    """Write the items of a work unit with the results of verification; column `item` numbers them over all sources."""
    result_columns = _build_columns(VerifiedItem, verified)
    item_columns = {name: c for name, c in _build_columns(Item, items).items() if name not in result_columns}
    numbers = pa.array(range(first_item, first_item + len(items)), pa.int64())
    _write_parquet(path, {"item": numbers, **item_columns, **result_columns})


def _build_columns(type_: type, records: list[Any]) -> dict[str, pa.Array]:
    hints = get_type_hints(type_)
    columns = zip(*map(astuple, records), strict=True) if records else ([] for _ in fields(type_))
    return {f.name: pa.array(c, ARROW_TYPES[hints[f.name]]) for f, c in zip(fields(type_), columns, strict=True)}


def _write_parquet(path: Path, columns: dict[str, pa.Array]) -> None:
    sink = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(table, sink, row_group_size=ROW_GROUP_SIZE, compression="zstd", write_page_checksum=True)
    write_atomic(path, sink.getvalue())
