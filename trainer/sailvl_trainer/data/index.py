"""What planning needs of every sample, without its pixels: tiles and tokens under one tokenizer and one tiling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from sailvl_trainer.data.chat import Encoded, encode_messages
from sailvl_trainer.data.shards import ShardReader, read_manifest
from sailvl_trainer.data.tiling import choose_grid, count_tiles
from sailvl_trainer.model.presets import Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """How samples become positions: everything that their lengths depend on."""

    tokenizer: PreTrainedTokenizerFast
    preset: Preset
    max_tiles: int
    pack_tokens: int
    """Longer samples lose their end."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of a picture; as many tiles as leave half of a pack for the words."""
        fits = max(1, self.pack_tokens // 2 // self.preset.tokens_per_tile - 1)
        return choose_grid(width, height, min(self.max_tiles, fits), self.preset.image_size)

    def encode(self, reader: ShardReader, row: int) -> Encoded:
        """A sample's ids and labels, cut to the length of a pack."""
        encoded = encode_messages(reader.sample(row).messages, self.tokenizer, self.image_tokens(reader, row))
        n = self.pack_tokens
        return Encoded(input_ids_T=encoded.input_ids_T[:n], labels_T=encoded.labels_T[:n])

    def tiles(self, reader: ShardReader, row: int) -> int:
        """Tiles of a row's picture, 0 without one."""
        entry = reader.rows[row]
        return count_tiles(self.grid(entry["width"], entry["height"])) if entry["image_size"] else 0

    def image_tokens(self, reader: ShardReader, row: int) -> int:
        """Positions of a row's picture."""
        return self.tiles(reader, row) * self.preset.tokens_per_tile


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """All samples of some directories, in a fixed order; S samples."""

    readers: tuple[ShardReader, ...]
    shard_S: np.ndarray
    row_S: np.ndarray
    tokens_S: np.ndarray
    tiles_S: np.ndarray
    truncated: int = field(default=0)
    """Samples that lost their end."""

    def __len__(self) -> int:
        return len(self.shard_S)

    @property
    def fingerprint(self) -> str:
        """Changes with any sample, its length, or the order."""
        digest = hashlib.sha256(self.tokens_S.tobytes() + self.tiles_S.tobytes())
        digest.update(json.dumps([[entry["key"] for entry in reader.rows] for reader in self.readers]).encode())
        return digest.hexdigest()[:16]


def build_index(directories: Sequence[Path], split: str, encoder: Encoder) -> Index:
    """Read every shard's index and count its samples' tokens. `split`: shards or held-out."""
    readers = tuple(
        ShardReader(directory / split, shard.name)
        for directory in directories
        for shard in read_manifest(directory / split).shards
    )
    rows = [(s, r) for s, reader in enumerate(readers) for r in range(len(reader))]
    tokens = [len(encoder.encode(readers[s], r).input_ids_T) for s, r in rows]
    return Index(
        readers=readers,
        shard_S=np.array([s for s, _ in rows], dtype=np.int32),
        row_S=np.array([r for _, r in rows], dtype=np.int32),
        tokens_S=np.array(tokens, dtype=np.int32),
        tiles_S=np.array([encoder.tiles(readers[s], r) for s, r in rows], dtype=np.int32),
        truncated=sum(t == encoder.pack_tokens for t in tokens),
    )
