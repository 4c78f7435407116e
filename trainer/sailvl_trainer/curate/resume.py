"""Which artifacts of an earlier attempt a later one can use.

An artifact is written atomically, but a power loss, a full volume or another run of the same claim may have damaged it
since. Each one is read as a whole before it is used; one that can't be used is set aside and made again. One that can't
be read at the moment, or for which memory is lacking, ends the attempt instead. `on_progress` is called again and again
during long reading; an error that it raises ends it. Called by stage.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sailvl_trainer.curate.artifacts import ARROW_TYPES, CurationArtifacts, PlannedShard
from sailvl_trainer.curate.items import Item, SourcePartition, ignore_progress
from sailvl_trainer.curate.verify import VerifiedItem
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file
from sailvl_trainer.storage.documents import find_document, identify_file, is_count, set_aside
from sailvl_trainer.storage.files import translate_read_errors
from sailvl_trainer.storage.shard_manifest import ShardInfo

LEAST_VALUES = {"offset": 0, "size": -1, "index": -1, "item": 0, "shard": 0, "position": 0}
"""Smallest possible values of integer columns; -1 means that there is none."""
MAX_GROUP_ROWS = 1 << 17
"""Largest number of rows of a row group: DuckDB's default is 122,880. Without a limit, a forged file of some kilobytes
could have so many rows that reading them takes years."""
BATCH_ROWS = 1024
"""Rows that are checked between two calls of `on_progress`."""
PLAN_COLUMNS = {"split": pa.string(), "shard": pa.int64(), "position": pa.int64(), "item": pa.int64()}

logger = logging.getLogger(__name__)


class _UnusableTableError(ValueError):
    """A Parquet file can't be used; the message says why."""


def has_partitions(artifacts: CurationArtifacts) -> bool:
    """Return whether the list of partitions can be used."""
    return _find(tuple[SourcePartition, ...], artifacts.partitions_file) is not None


def has_items(artifacts: CurationArtifacts, partition: int, on_progress: Callable[[], None] = ignore_progress) -> bool:
    """Return whether the item list of a partition can be used."""
    return _is_usable(artifacts.items_file(partition), _count_rows, _list_columns(Item), on_progress)


def has_rows(artifacts: CurationArtifacts, unit: int, on_progress: Callable[[], None] = ignore_progress) -> bool:
    """Return whether the verified items of a work unit can be used: they are those of the unit, in its order."""
    first, count = artifacts.units[unit].first_item, artifacts.units[unit].count

    def check(batches: Iterator[pa.RecordBatch]) -> None:
        numbers = [batch.column("item").to_numpy() for batch in batches]
        if not np.array_equal(np.concatenate([np.empty(0, np.int64), *numbers]), np.arange(first, first + count)):
            raise _UnusableTableError(f"its items aren't {first} to {first + count - 1}")

    columns = {"item": (pa.int64(), False)} | _list_columns(Item) | _list_columns(VerifiedItem)
    return _is_usable(artifacts.rows_file(unit), check, columns, on_progress)


def has_selection(artifacts: CurationArtifacts, on_progress: Callable[[], None] = ignore_progress) -> bool:
    """Return whether decisions, plan and list of shards can be used, and belong to each other."""

    def check_shards(shards: list[PlannedShard]) -> str:
        is_valid = all(is_count(shard.number, shard.samples) for shard in shards)
        return "" if is_valid else "it has a negative number"

    def check_plan(batches: Iterator[pa.RecordBatch]) -> None:
        expected = sum(shard.samples for shard in shards or ())
        if (rows := _count_rows(batches)) != expected:
            raise _UnusableTableError(f"it has {rows} rows, but the list of shards {expected} samples")

    shards = _find(list[PlannedShard], artifacts.shards, check=check_shards)
    if shards is None:
        return False
    plan = {name: (type_, False) for name, type_ in PLAN_COLUMNS.items()} | _list_columns(Item)
    decisions = {"item": (pa.int64(), False), "outcome": (pa.string(), False)}
    return _is_usable(artifacts.plan, check_plan, plan, on_progress) and _is_usable(
        artifacts.decisions, _count_rows, decisions, on_progress
    )


def has_shard(artifacts: CurationArtifacts, output: Path, shard: PlannedShard) -> bool:
    """Return whether a shard is complete: its ShardInfo can be used, and its files have the sizes in it."""

    def check(info: ShardInfo) -> str:
        if (info.name, info.samples) != (shard.name, shard.samples):
            return f"it is that of shard {info.name[:20]} with {info.samples} samples"
        sizes = {".tar": info.bytes, ".arrow": info.index_bytes}
        wrong = [suffix for suffix, size in sizes.items() if _measure(folder / f"{info.name}{suffix}") != size]
        return f"{shard.name}{wrong[0]} has another size" if wrong else ""

    folder = output / shard.split
    return _find(ShardInfo, artifacts.shard_info_file(shard), check=check) is not None


def _find(type_: Any, path: Path, *, check: Callable[[Any], str] = lambda document: "") -> Any:
    """Return a JSON artifact; None if it doesn't exist or had to be set aside."""
    return find_document(type_, path, DataRoots.resolve(path.parent), check=check, should_set_aside=True)


def _measure(path: Path) -> int:
    """Return the size of a file; -1 if there is none. Raises StorageError if the volume doesn't show it."""
    try:
        with translate_read_errors(path):
            return path.stat().st_size
    except OSError:
        return -1


def _list_columns(type_: type) -> dict[str, tuple[pa.DataType, bool]]:
    """Return the column types of a dataclass's fields, and whether each may be empty."""
    hints = get_type_hints(type_)
    return {f.name: (ARROW_TYPES[hints[f.name]], hints[f.name] in (str | None, int | None)) for f in fields(type_)}


def _is_usable(
    path: Path,
    check: Callable[[Iterator[pa.RecordBatch]], object],
    columns: dict[str, tuple[pa.DataType, bool]],
    on_progress: Callable[[], None],
) -> bool:
    """Return whether a Parquet file exists and passes a check of its batches; set it aside if it doesn't.

    Raises StorageError if it can't be read, MemoryError if memory is lacking.
    """
    identity, roots = identify_file(path), DataRoots.resolve(path.parent)
    try:
        with translate_read_errors(path), open_data_file(path, roots) as file, _translate_content_errors():
            check(_iterate_batches(file, columns, on_progress))
    except FileNotFoundError:
        return False
    except (OSError, RefusedFileError, _UnusableTableError) as error:
        logger.warning("%s is not used: %s", path, error)
        if identity is not None:
            set_aside(path, identity=identity)
        return False
    return True


@contextmanager
def _translate_content_errors() -> Iterator[None]:
    """Raise _UnusableTableError in place of errors about the content of a table.

    Arrow raises an OSError without errno for some of them. Errors of the system have one, and lacking memory is an
    ArrowException too.
    """
    try:
        yield
    except MemoryError:
        raise
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _UnusableTableError(str(error)) from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        raise _UnusableTableError(str(error)) from error


def _iterate_batches(
    file: Any, columns: dict[str, tuple[pa.DataType, bool]], on_progress: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an open Parquet file, each checked as a whole. Raises _UnusableTableError."""
    table = pq.ParquetFile(file, page_checksum_verification=True)
    found = {field.name: field.type for field in table.schema_arrow}
    for name, (type_, _) in columns.items():
        if found.get(name) != type_:
            raise _UnusableTableError(f"column {name} has type {found.get(name)}, expected {type_}")
    for number in range(table.num_row_groups):
        if table.metadata.row_group(number).num_rows > MAX_GROUP_ROWS:
            raise _UnusableTableError(f"row group {number} has more than {MAX_GROUP_ROWS} rows")
    for batch in table.iter_batches(BATCH_ROWS):
        on_progress()
        _check_batch(batch, columns)
        yield batch


def _check_batch(batch: pa.RecordBatch, columns: dict[str, tuple[pa.DataType, bool]]) -> None:
    batch.validate(full=True)
    for name, (_, is_optional) in columns.items():
        column = batch.column(name)
        if column.null_count and not is_optional:
            raise _UnusableTableError(f"column {name} has empty cells")
        if name in LEAST_VALUES and len(column) and pc.min(column).as_py() < LEAST_VALUES[name]:
            raise _UnusableTableError(f"column {name} has a value below {LEAST_VALUES[name]}")


def _count_rows(batches: Iterator[pa.RecordBatch]) -> int:
    return sum(batch.num_rows for batch in batches)
