"""The samples of a data set and their lengths, without their pixels: what planning needs.

Text tokens come from the shards' own index if it was counted by the same tokenizer; tiles follow from width and height.
Called by the training stage before its first step, and by the caption-loss benchmark.
Suffixes: S samples of the set, W requested samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sailvl_trainer.data.encoder import LENGTHS, SampleEncoder
from sailvl_trainer.data.shards import ShardPool, ShardReader, read_shard_manifest
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.errors import translate_storage_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardDataset:
    """The samples of one or more directories in a fixed order; a sample's number is its index in that order."""

    pool: ShardPool
    starts: np.ndarray
    """Number of each shard's first sample; the last entry is the number of samples."""
    lengths_S: np.ndarray
    """LENGTHS of all samples, in memory or memory-mapped."""
    fingerprint: str
    """Hash of the samples, their lengths and their order."""
    tokens_per_tile: int

    def __len__(self) -> int:
        return len(self.lengths_S)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of an epoch, image tokens included."""
        return int(self.lengths_S["tokens"].sum(dtype=np.int64))

    @cached_property
    def most_tiles(self) -> int:
        """Number of tiles of the image that has the most."""
        return int(self.lengths_S["tiles"].max(initial=0))

    @cached_property
    def truncated(self) -> int:
        """Number of samples that are longer than a pack and are truncated."""
        return int(self.lengths_S["is_truncated"].sum())

    def lengths(self, samples_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and tiles of samples, as int64 arrays of shape (W,)."""
        lengths_W = self.lengths_S[samples_W]
        return lengths_W["tokens"].astype(np.int64), lengths_W["tiles"].astype(np.int64)

    def locate(self, sample: int) -> tuple[ShardReader, int]:
        """Return the reader of a sample's shard, and the sample's row in it."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.pool[shard], sample - int(self.starts[shard])


def build_dataset(
    directories: Sequence[Path], split: str, encoder: SampleEncoder, cache: Path | None = None
) -> ShardDataset:
    """Open the shards below each directory's `split` folder and measure every sample.

    With `cache`, lengths are kept in that folder for the next start and memory-mapped. Raises DataError for a directory
    without a manifest, or a shard without its index.
    """
    shards = [(folder / split, info) for folder in directories for info in read_shard_manifest(folder / split).shards]
    hashes = json.dumps([encoder.fingerprint, *(info.sha256 for _, info in shards)])
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    pool = ShardPool([(folder, info.name) for folder, info in shards])
    starts = np.cumsum([0, *(info.samples for _, info in shards)])
    path = None if cache is None else cache / f"{split}-{fingerprint}.npy"
    dataset = ShardDataset(
        pool=pool,
        starts=starts,
        lengths_S=_load_or_measure(pool, starts, encoder, path),
        fingerprint=fingerprint,
        tokens_per_tile=encoder.preset.tokens_per_tile,
    )
    if dataset.truncated:
        logger.warning(
            "%d of %d samples are longer than packTokens (%d) and are truncated",
            dataset.truncated, len(dataset), encoder.pack_tokens,
        )  # fmt: skip
    return dataset


def _load_or_measure(pool: ShardPool, starts: np.ndarray, encoder: SampleEncoder, path: Path | None) -> np.ndarray:
    if path is None:
        return _measure(pool, starts, encoder, np.empty(starts[-1], dtype=LENGTHS))
    if not path.exists() and starts[-1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # ranks in containers share process ids
        try:
            mapped_S = _create_mapped(temporary, int(starts[-1]))
            _measure(pool, starts, encoder, mapped_S)
            mapped_S.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    found: np.ndarray = np.load(path, mmap_mode="r") if starts[-1] else np.empty(0, dtype=LENGTHS)
    return found


def _create_mapped(path: Path, samples: int) -> np.memmap:
    """Create and map a file of LENGTHS. Its space is allocated at once: a full disk would otherwise raise SIGBUS
    later."""
    with translate_storage_errors(path):
        mapped_S = np.lib.format.open_memmap(path, mode="w+", dtype=LENGTHS, shape=(samples,))
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped_S


def _measure(pool: ShardPool, starts: np.ndarray, encoder: SampleEncoder, lengths_S: np.ndarray) -> np.ndarray:
    for shard in range(len(starts) - 1):
        reader = pool[shard]
        first, end = int(starts[shard]), int(starts[shard + 1])
        if len(reader) != end - first:
            raise DataError(
                f"shard {reader.path} has {len(reader)} rows, but {end - first} in the manifest; copy the set again"
            )
        lengths_S[first:end] = encoder.measure(reader, _text_tokens(encoder, reader))
    return lengths_S


def _text_tokens(encoder: SampleEncoder, reader: ShardReader) -> np.ndarray:
    """Return the text tokens of all rows from the index; count them if another tokenizer did."""
    counter = encoder.counter
    if reader.counted_by == counter.fingerprint:
        return reader.column("text_tokens")
    return counter.count_shard(reader)
