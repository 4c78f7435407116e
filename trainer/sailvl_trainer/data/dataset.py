"""What planning needs of every sample, without its pixels: tiles and tokens under one tokenizer and one tiling.

Positions of words are in the shards' own index where it was counted by the same tokenizer; tiles follow from widths
and heights. Called by the training stage, once before its first step. Suffixes: S samples, R rows, W samples asked for.
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
from transformers import PreTrainedTokenizerFast

from sailvl_trainer.data.chat import Encoded, build_template, count_positions, cut, encode_messages
from sailvl_trainer.data.samples import Sample, check_image_placeholder
from sailvl_trainer.data.shards import ShardPool, ShardReader, read_manifest
from sailvl_trainer.data.tiling import choose_grid, choose_grids
from sailvl_trainer.errors import ConfigError, DataError
from sailvl_trainer.model.presets import Preset
from sailvl_trainer.storage.errors import translate_storage_errors

logger = logging.getLogger(__name__)

LENGTHS = np.dtype([("tokens", np.int32), ("tiles", np.int16), ("is_cut", np.bool_)])
"""A sample: positions in its pack, tiles with the thumbnail, and whether it lost a part to fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounter:
    """Counts what curation writes into a shard's index, so that training need not; see shards.Counter."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer and the template."""
        return build_template(self.tokenizer).fingerprint

    def count(self, sample: Sample) -> tuple[int, int]:
        """Positions without the picture's, and labels."""
        return count_positions(sample.messages, self.tokenizer, has_picture=sample.image is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """How samples become positions: everything that their lengths depend on."""

    tokenizer: PreTrainedTokenizerFast
    preset: Preset
    max_tiles: int
    pack_tokens: int
    """Longer samples lose their end."""

    def __post_init__(self) -> None:
        least = 2 * self.preset.tokens_per_tile
        if self.pack_tokens < least:
            raise ConfigError(
                f"packTokens is {self.pack_tokens} and a tile of preset {self.preset.name} has "
                f"{self.preset.tokens_per_tile} positions; write at least {least}"
            )

    @property
    def fingerprint(self) -> str:
        """Changes with any length."""
        tiling = f"{self.preset.image_size} {self.preset.tokens_per_tile} {self._tile_limit} {self.pack_tokens}"
        return f"{build_template(self.tokenizer).fingerprint} {tiling}"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of a picture; as many tiles as leave half of a pack for the words."""
        return choose_grid(width, height, self._tile_limit, self.preset.image_size)

    def encode(self, reader: ShardReader, row: int, tiles: int) -> Encoded:
        """A sample's ids and labels, cut to the length of a pack. Raises DataError that names shard and record."""
        sample = reader.sample(row)
        try:
            check_image_placeholder(sample.messages, has_image=tiles > 0)
        except ValueError as error:
            raise reader.error(row, error) from error
        encoded = encode_messages(sample.messages, self.tokenizer, tiles * self.preset.tokens_per_tile)
        return cut(encoded, self.pack_tokens, build_template(self.tokenizer).image_context)

    def measure(self, reader: ShardReader) -> np.ndarray:
        """LENGTHS of all rows of a shard."""
        lengths_R = np.empty(len(reader), dtype=LENGTHS)
        cols_R, rows_R = choose_grids(
            reader.column("width"), reader.column("height"), self._tile_limit, self.preset.image_size
        )
        tiles_R = np.where(reader.column("image_size") > 0, cols_R * rows_R + (cols_R * rows_R > 1), 0)
        tokens_R = self._positions(reader) + tiles_R * self.preset.tokens_per_tile
        lengths_R["tiles"], lengths_R["is_cut"] = tiles_R, tokens_R > self.pack_tokens
        lengths_R["tokens"] = np.minimum(tokens_R, self.pack_tokens)
        return lengths_R

    @property
    def _tile_limit(self) -> int:
        return min(self.max_tiles, max(1, self.pack_tokens // 2 // self.preset.tokens_per_tile - 1))

    def _positions(self, reader: ShardReader) -> np.ndarray:
        """Positions of all rows' words: as the shard says, or counted now where another tokenizer counted."""
        counter = TokenCounter(tokenizer=self.tokenizer)
        if reader.counted_by == counter.fingerprint:
            return reader.column("positions")
        return np.array([_count(counter, reader, row) for row in range(len(reader))], dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Index:
    """All samples of some directories, in a fixed order; a sample's number is its place in it."""

    pool: ShardPool
    starts: np.ndarray
    """First sample of every shard, and the number of samples."""
    lengths_S: np.ndarray
    """LENGTHS, in memory or mapped."""
    fingerprint: str
    """Changes with any sample, its length, or the order."""
    tokens_per_tile: int

    def __len__(self) -> int:
        return len(self.lengths_S)

    @cached_property
    def tokens(self) -> int:
        """Of an epoch."""
        return int(self.lengths_S["tokens"].sum(dtype=np.int64))

    @cached_property
    def most_tiles(self) -> int:
        """Of a picture."""
        return int(self.lengths_S["tiles"].max(initial=0))

    @cached_property
    def truncated(self) -> int:
        """Samples that lost a part to fit a pack."""
        return int(self.lengths_S["is_cut"].sum())

    def lengths(self, samples_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and tiles of samples."""
        lengths_W = self.lengths_S[samples_W]
        return lengths_W["tokens"].astype(np.int64), lengths_W["tiles"].astype(np.int64)

    def locate(self, sample: int) -> tuple[ShardReader, int]:
        """A sample's shard and row."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.pool[shard], sample - int(self.starts[shard])


def build_index(directories: Sequence[Path], split: str, encoder: Encoder, cache: Path | None = None) -> Index:
    """Measure every sample. `split`: shards or held-out. `cache`: where lengths are kept for the next start, mapped.

    Raises DataError for a directory without a set, or a shard without its index.
    """
    shards = [(folder / split, info) for folder in directories for info in read_manifest(folder / split).shards]
    hashes = json.dumps([encoder.fingerprint, *(info.sha256 for _, info in shards)])
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    pool = ShardPool([(folder, info.name) for folder, info in shards])
    starts = np.cumsum([0, *(info.samples for _, info in shards)])
    path = None if cache is None else cache / f"{split}-{fingerprint}.npy"
    index = Index(
        pool=pool,
        starts=starts,
        lengths_S=_load_or_measure(pool, starts, encoder, path),
        fingerprint=fingerprint,
        tokens_per_tile=encoder.preset.tokens_per_tile,
    )
    if index.truncated:
        logger.warning(
            "%d of %d samples are longer than packTokens, %d, and lose their end", index.truncated, len(index),
            encoder.pack_tokens,
        )  # fmt: skip
    return index


def _load_or_measure(pool: ShardPool, starts: np.ndarray, encoder: Encoder, path: Path | None) -> np.ndarray:
    if path is None:
        return _measure(pool, starts, encoder, np.empty(starts[-1], dtype=LENGTHS))
    if not path.exists() and starts[-1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # ranks in containers share process ids
        try:
            mapped_S = _map(temporary, int(starts[-1]))
            _measure(pool, starts, encoder, mapped_S)
            mapped_S.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    found: np.ndarray = np.load(path, mmap_mode="r") if starts[-1] else np.empty(0, dtype=LENGTHS)
    return found


def _map(path: Path, samples: int) -> np.memmap:
    """An empty file of LENGTHS, mapped. With room on the disk: else a full one would end the process by SIGBUS."""
    with translate_storage_errors(path):
        mapped_S = np.lib.format.open_memmap(path, mode="w+", dtype=LENGTHS, shape=(samples,))
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped_S


def _count(counter: TokenCounter, reader: ShardReader, row: int) -> int:
    try:
        return counter.count(reader.sample(row))[0]
    except ValueError as error:
        raise reader.error(row, error) from error


def _measure(pool: ShardPool, starts: np.ndarray, encoder: Encoder, lengths_S: np.ndarray) -> np.ndarray:
    for shard in range(len(starts) - 1):
        reader = pool[shard]
        first, end = int(starts[shard]), int(starts[shard + 1])
        if len(reader) != end - first:
            raise DataError(
                f"shard {reader.path}: {len(reader)} rows and {end - first} in the manifest; copy the set again"
            )
        lengths_S[first:end] = encoder.measure(reader)
    return lengths_S
