"""The curate stage: from raw sources to shards, a held-out set and a report. Called by rank/main.py on every rank.

Every step leaves its output below <output>/artifacts, so that a later attempt continues where this one was interrupted.
The shards are the same bytes for any number of ranks.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, CurateConfig, Result
from sailvl_trainer.curate import resume, sources
from sailvl_trainer.curate.artifacts import (
    CurationArtifacts,
    PlannedShard,
    parse_items,
    read_items,
    write_items,
    write_verified_items,
)
from sailvl_trainer.curate.items import Item, SourcePartition, measure_item, read_item
from sailvl_trainer.curate.report import write_report
from sailvl_trainer.curate.selection import select_samples
from sailvl_trainer.curate.statistics import Statistics, read_statistics
from sailvl_trainer.curate.verify import VerifiedItem, verify_item
from sailvl_trainer.data.encoder import TokenCounter
from sailvl_trainer.data.image_memory import FILE_MEMORY, limit_image_memory
from sailvl_trainer.data.samples import Sample, build_caption_sample
from sailvl_trainer.data.shards import ShardWriter
from sailvl_trainer.errors import DataError, StorageError
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from sailvl_trainer.storage.codec import decode
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError
from sailvl_trainer.storage.documents import write_document
from sailvl_trainer.storage.files import translate_read_errors
from sailvl_trainer.storage.shard_manifest import ShardInfo, write_shard_manifest

READ_AHEAD = 64
"""Maximum number of images in memory while a shard is written; their bytes are limited by FILE_MEMORY."""
T = TypeVar("T")


def run(context: Context) -> Result:
    """Run the stage. COLLECTIVE. Raises ConfigError if a source doesn't exist or if every image was dropped."""
    started, config = time.monotonic(), context.stage.curate
    assert config is not None, "read_stage has checked the kind"
    pool, artifacts = TaskPool(context), CurationArtifacts(context.files.output / "artifacts")
    limit_image_memory(context.memory_bytes)
    roots = sources.resolve_roots(config.sources, context.stage.storage)
    context.telemetry.update(phase="running", unit="samples", step=0)

    # 1. Divide the sources into partitions: image folders, tars, synthetic sets.
    pool.run_on_first_rank("listing", lambda: list_partitions(context, pool, artifacts, config))
    # 2. List the items of each partition without decoding them.
    list_items(pool, artifacts, roots)
    # 3. Decode, measure and hash every item, or record why it is dropped.
    verify_items(context, pool, artifacts, config, roots)
    # 4. Drop duplicates, choose the held-out samples, and assign the rest to shards.
    pool.run_on_first_rank("deciding", lambda: _select_samples(context, pool, artifacts, config))
    # 5. Write the shards.
    write_shards(context, pool, artifacts, roots)
    # 6. Publish the shards in their manifests, and report.
    pool.run_on_first_rank("reporting", lambda: _publish(context, artifacts, config, roots))
    return _build_result(context, read_statistics(context.files.report), time.monotonic() - started)


def list_partitions(context: Context, pool: TaskPool, artifacts: CurationArtifacts, config: CurateConfig) -> None:
    """Write the list of partitions of all sources, unless an earlier attempt has. Called on the first rank."""
    if not resume.has_partitions(artifacts):
        partitions = sources.list_partitions(config.sources, context.stage.seed, pool.report_activity)
        write_document(artifacts.partitions_file, partitions, advice="divide the sources between several stages")


def list_items(pool: TaskPool, artifacts: CurationArtifacts, roots: DataRoots) -> None:
    """Write the item list of each partition, so that later steps and attempts see the same items in the same order."""
    partitions = artifacts.partitions

    def run_task(number: int) -> None:
        items = sources.list_items(partitions[number], roots, pool.report_activity)
        write_items(artifacts.items_file(number), _report_each(pool, items))

    def is_done(number: int) -> bool:
        return resume.has_items(artifacts, number, pool.report_activity)

    pool.run("listing", len(partitions), is_done, run_task)


def verify_items(
    context: Context, pool: TaskPool, artifacts: CurationArtifacts, config: CurateConfig, roots: DataRoots
) -> None:
    """Decode, measure and hash every item, and write one file of rows per work unit."""
    units, tile_size = artifacts.units, get_preset(context.stage.model.preset).image_size
    context.telemetry.update(steps=sum(unit.count for unit in units))

    def run_task(number: int) -> None:
        unit = units[number]
        items = read_items(artifacts.items_file(unit.partition), unit.first, unit.count)
        results = threads.map(lambda item: verify_item(item, config, tile_size, roots), items)
        verified = list(_report_each(pool, results))
        _check_source_exists(artifacts.partitions[unit.partition], verified)
        write_verified_items(artifacts.rows_file(number), unit.first_item, items, verified)

    with _suppress_warnings(), _start_threads() as threads:
        pool.run(
            "verifying",
            len(units),
            lambda number: resume.has_rows(artifacts, number, pool.report_activity),
            run_task,
            count_samples=lambda number: units[number].count,
        )


def _select_samples(context: Context, pool: TaskPool, artifacts: CurationArtifacts, config: CurateConfig) -> None:
    if resume.has_selection(artifacts, pool.report_activity):
        return
    for outcome, count in sorted(select_samples(artifacts, config).items()):
        context.telemetry.count_samples(outcome, count)


def write_shards(context: Context, pool: TaskPool, artifacts: CurationArtifacts, roots: DataRoots) -> None:
    """Write every planned shard, and then its ShardInfo, by which a later attempt recognises a complete shard."""
    shards = decode(list[PlannedShard], artifacts.shards.read_bytes())
    counter = _build_token_counter(context)

    def run_task(number: int) -> None:
        shard = shards[number]
        with ShardWriter(context.files.output / shard.split, shard.name, counter) as writer:
            for sample, size in _report_each(pool, _read_samples(artifacts.plan, shard, roots)):
                writer.write(sample, size)
        write_document(artifacts.shard_info_file(shard), writer.info)

    output = context.files.output
    pool.run("writing", len(shards), lambda number: resume.has_shard(artifacts, output, shards[number]), run_task)


def write_manifests(context: Context, artifacts: CurationArtifacts) -> None:
    """Write the manifests of both splits and remove temporary files of killed attempts. Called on the first rank."""
    shards = decode(list[PlannedShard], artifacts.shards.read_bytes())
    for split in (SHARDS_DIR, HELD_OUT_DIR):
        infos = [decode(ShardInfo, artifacts.shard_info_file(s).read_bytes()) for s in shards if s.split == split]
        write_shard_manifest(context.files.output / split, infos)
        for temporary in (context.files.output / split).glob(".*.tar.*"):
            temporary.unlink(missing_ok=True)


def _publish(context: Context, artifacts: CurationArtifacts, config: CurateConfig, roots: DataRoots) -> None:
    write_manifests(context, artifacts)
    write_report(artifacts, context.files.report, config, roots)


def _build_result(context: Context, statistics: Statistics, seconds: float) -> Result:
    return Result(
        stage=context.stage.stage,
        kind="curate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=statistics.items,
        samples=statistics.kept_count,
        seconds=seconds,
        metrics=statistics.metrics,
    )


def _check_source_exists(partition: SourcePartition, verified: list[VerifiedItem]) -> None:
    """Raise StorageError if the whole source is gone since it was listed; single missing files are only counted."""
    has_missing = any(result.outcome == "missing" for result in verified)
    path = Path(os.fsdecode(partition.path))
    if has_missing and partition.path and not path.exists():
        raise StorageError(
            f"source {partition.source}: {path} was listed but does not exist any more; check that its "
            "volume is mounted. Results of verified items are kept"
        )


def _build_token_counter(context: Context) -> TokenCounter | None:
    """Return a counter of text tokens for the shards' index, or None if the run's tokenizer is not known yet."""
    model = context.stage.model
    has_tokenizer = model.preset == "tiny" or model.language is not None
    return TokenCounter(tokenizer=load_tokenizer(model)) if has_tokenizer else None


def _read_samples(plan: Path, shard: PlannedShard, roots: DataRoots) -> Iterator[tuple[Sample, tuple[int, int]]]:
    """Yield the samples of a shard in the plan's order, each with the width and height of its image."""
    filters = [("split", "=", shard.split), ("shard", "=", shard.number)]
    table = pq.read_table(plan, filters=filters, partitioning=None).sort_by("position")
    with _start_threads() as threads:
        sizes = (size for batch in _iter_slices(table) for size in threads.map(measure_item, parse_items(batch)))
        for first, count in split_by_bytes(sizes, READ_AHEAD, FILE_MEMORY.total_bytes):
            chunk = table.slice(first, count)
            items = parse_items(chunk)
            images = threads.map(lambda item: _read_image(item, roots), items)
            for row, item, data in zip(chunk.to_pylist(), items, images, strict=True):
                key = f"{row['item']:09d}-{item.key}"
                sample = build_caption_sample(key, data, row["format"], row["text"], {"source": item.source})
                yield sample, (row["width"], row["height"])


def _iter_slices(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(first, READ_AHEAD) for first in range(0, table.num_rows, READ_AHEAD))


def split_by_bytes(sizes: Iterable[int], max_count: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first index and count of consecutive parts with at most `max_count` sizes and `max_bytes` in total.

    A size above the limit is a part of its own.
    """
    first, count, total = 0, 0, 0
    for size in sizes:
        if count and (count == max_count or total + size > max_bytes):
            yield first, count
            first, count, total = first + count, 0, 0
        count, total = count + 1, total + size
    if count:
        yield first, count


def _read_image(item: Item, roots: DataRoots) -> bytes:
    """Return the encoded image of a verified item.

    Raises DataError if it is gone or truncated since, StorageError if it can't be read.
    """
    try:
        with translate_read_errors(Path(os.fsdecode(item.path))):
            data = read_item(item, roots).image
    except (OSError, RefusedFileError) as error:
        raise DataError(
            f"{item.source}: {item.key} was verified but can't be read any more: {error}; restore the file"
        ) from error
    if item.size >= 0 and len(data) != item.size:
        raise DataError(f"{item.source}: {item.key} was verified but its tar is truncated now; restore the tar")
    return data


def _report_each(pool: TaskPool, values: Iterable[T]) -> Iterator[T]:
    """Yield the values and report activity after each, which ends the task if a stop was requested."""
    for value in values:
        yield value
        pool.report_activity()


def _start_threads() -> ThreadPoolExecutor:
    """Start one thread per core of this rank; decoding, resizing and hashing release the GIL."""
    return ThreadPoolExecutor(torch.get_num_threads())


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about unusual metadata of readable images: one line per image would flood the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
