"""Opens data sets whose sample lengths are measured once, by all ranks together, and cached on the storage.

1. If the lengths are in the cache and intact, every rank maps them, and nothing else is read.
2. Otherwise the ranks count the tokens of those shards whose index was counted by another tokenizer. Each shard is a
   task that one rank claims, and its counts are a file of their own, so that an interrupted start can be continued.
3. The first rank computes all lengths from the indexes and the counts, writes them to the cache and deletes the counts.

The price of an empty cache is one more pass over the shards' indexes, by all ranks, even if nothing has to be counted.

The cache is keyed by a hash of the shards, the tokenizer and the tiling. Images are never read. Heartbeats continue
throughout, and a stop request is obeyed within seconds, in the middle of a shard.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sailvl_trainer.data.dataset import (
    ShardDataset,
    ShardList,
    build_dataset,
    compute_fingerprint,
    has_lengths,
    list_shards,
    load_lengths,
    write_lengths,
)
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.token_counts import TokenCountFiles
from sailvl_trainer.rank.collectives import broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from sailvl_trainer.rank.file_verification import verify_input
from sailvl_trainer.storage.lineage import check_not_superseded, find_newest_attempt

INDEX_DIR = "index"
"""Folder below the stage's directory that holds the cache."""
LOG_SECONDS = 30.0
"""Minimum time between two log messages about the progress of counting."""

logger = logging.getLogger(__name__)


def open_dataset(context: Context, directories: Sequence[Path], split: str, encoder: SampleEncoder) -> ShardDataset:
    """Return the dataset of a split in all directories; measure its samples if the cache lacks them. COLLECTIVE.

    The hashes of shards that this run didn't write are verified first. Raises DataError for a missing manifest, for a
    shard or index that is missing or differs from it, and for a record that can't be counted; StorageError if the
    volume is full or unavailable; Preempted if a stop was requested.
    """
    shards = list_shards(directories, split, storage=context.files.storage)
    verify_input(context, shards.files, advice="copy or curate the data set again")
    if not shards.samples:
        return build_dataset(shards, encoder)
    folder = context.files.output / INDEX_DIR
    path = folder / f"{split}-{compute_fingerprint(shards, encoder)}.npy"
    if not broadcast_value(bool, has_lengths(path, shards.samples) if context.is_first else None):
        counts = TokenCountFiles(folder=folder / f"{path.stem}-tokens", counter=encoder.counter)
        pool = TaskPool(context)
        _count_tokens(context, pool, shards, counts)
        pool.run_on_first_rank("measuring", lambda: _fill_cache(context, path, shards, encoder, counts))
    return build_dataset(shards, encoder, load_lengths(path))


def _count_tokens(context: Context, pool: TaskPool, shards: ShardList, counts: TokenCountFiles) -> None:
    """Count the shards that need it, each on one rank. COLLECTIVE."""
    report = _build_progress_log(context, len(shards))

    def count_shard(number: int) -> None:
        info, reader = shards.infos[number], shards.pool[number]
        if counts.is_needed(reader):
            counts.count(info, reader, lambda _: pool.report_activity())
            context.telemetry.count_samples("counted", info.samples)
            report(number)

    pool.run("counting", len(shards), lambda number: counts.is_counted(shards.infos[number]), count_shard)


def _fill_cache(
    context: Context, path: Path, shards: ShardList, encoder: SampleEncoder, counts: TokenCountFiles
) -> None:
    """Write the lengths, and delete the counts and what killed starts have left. Called on the first rank."""
    if not _is_superseded(context):
        for stale in path.parent.glob(f"{path.stem}.*.tmp"):
            stale.unlink(missing_ok=True)
    try:
        write_lengths(path, shards, encoder, counts=counts)
    except FileNotFoundError:  # a later attempt deletes temporary files
        check_not_superseded(context.files, context.stage.attempt)
        raise
    if not _is_superseded(context):
        shutil.rmtree(counts.folder, ignore_errors=True)


def _is_superseded(context: Context) -> bool:
    """Whether a later attempt has claimed the stage; its files must not be deleted."""
    return find_newest_attempt(context.files) > context.stage.attempt


def _build_progress_log(context: Context, total: int) -> Callable[[int], None]:
    """Return the function that logs the number of a counted shard, at most every LOG_SECONDS and on the first rank
    only.

    Ranks claim shards in order, so the number of the latest one shows how many have been claimed.
    """
    logged = 0.0

    def report(number: int) -> None:
        nonlocal logged
        if context.is_first and time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            logger.info("counting tokens with the stage's tokenizer: shard %d of %d", number + 1, total)

    return report
