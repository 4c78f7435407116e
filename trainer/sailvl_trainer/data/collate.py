"""A pack as tensors; called by the loader's threads.

How samples are kept apart: `position_ids_1T` restarts at 0 with every sample, and again with the padding. Given these
positions, no attention mask and no cache, transformers' Qwen2 builds the block-diagonal causal mask itself (sdpa), or
the cumulative lengths (flash attention), on CPU and GPU alike; so no mask travels with a batch.

Suffixes: T positions (pack_tokens), N tiles, H = W = image_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sailvl_trainer.data.chat import IGNORE
from sailvl_trainer.data.dataset import Encoder, Index
from sailvl_trainer.data.images import UnreadableImage, open_image
from sailvl_trainer.data.packing import Pack
from sailvl_trainer.data.tiling import count_tiles, cut_tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    input_ids_1T: torch.Tensor
    """int64, padded with the pad token. <IMG_CONTEXT> marks where features belong: tokens_per_tile a tile, in the
    order of the tiles."""
    labels_1T: torch.Tensor
    """int64, IGNORE where there is no loss; shifted: the label of a position is the next position's id."""
    position_ids_1T: torch.Tensor
    """int64, restarting at 0 with every sample, and with the padding."""
    pixels_N3HW: torch.Tensor
    """float32; never empty: a pack without pictures has one black tile that no position refers to."""
    samples: Pack
    """Their numbers in the index, in the order in which they stand."""
    tokens: int
    """Positions, padding not counted."""
    labels: int
    """Positions with loss."""
    tiles: int
    """Of pictures; 0 where the only tile is the black one."""
    pairs: int
    """Of positions of the same sample: attention's work."""


def collate(index: Index, encoder: Encoder, pack: Pack, *, pictures: Pack | None = None) -> Batch:
    """Decode and join a pack's samples. `pictures`: whose picture each sample shows; default its own.

    Raises DataError that names the shard and the record of what can't be read.
    """
    length, pad = encoder.pack_tokens, encoder.tokenizer.pad_token_id
    input_ids_T = np.full(length, pad, dtype=np.int64)
    labels_T = np.full(length, IGNORE, dtype=np.int64)
    positions_T = np.zeros(length, dtype=np.int64)
    (tokens_W, tiles_W), at = index.lengths(np.array(pack, dtype=np.int64)), 0
    pixels = []
    for place, sample in enumerate(pack):
        reader, row = index.locate(sample)
        encoded = encoder.encode(reader, row, int(tiles_W[place]))
        n = len(encoded.input_ids_T)
        if n != tokens_W[place]:
            raise reader.error(row, f"{n} positions, and {tokens_W[place]} in the index; curate the set again")
        input_ids_T[at : at + n] = encoded.input_ids_T
        labels_T[at : at + n - 1] = encoded.labels_T[1:]
        positions_T[at : at + n] = np.arange(n)
        at += n
        if tiles_W[place]:
            pixels.append(_read_tiles(index, encoder, sample, sample if pictures is None else pictures[place]))
    positions_T[at:] = np.arange(length - at)
    return Batch(
        input_ids_1T=torch.from_numpy(input_ids_T)[None],
        labels_1T=torch.from_numpy(labels_T)[None],
        position_ids_1T=torch.from_numpy(positions_T)[None],
        pixels_N3HW=torch.from_numpy(np.concatenate(pixels) if pixels else _no_tile(encoder.preset.image_size)),
        samples=pack,
        tokens=at,
        labels=int((labels_T != IGNORE).sum()),
        tiles=int(tiles_W.sum()),
        pairs=int((tokens_W**2).sum()),
    )


def _read_tiles(index: Index, encoder: Encoder, sample: int, shown: int) -> np.ndarray:
    """The tiles of `shown`'s picture, cut by `sample`'s grid so that every length stays."""
    own, own_row = index.locate(sample)
    grid = encoder.grid(int(own.column("width")[own_row]), int(own.column("height")[own_row]))
    assert count_tiles(grid) == index.lengths_S["tiles"][sample], "the index was measured with this encoder"
    reader, row = index.locate(shown)
    data = reader.image(row)
    assert data is not None, "only pictures are shown"
    try:
        image = open_image(data)
    except UnreadableImage as error:
        raise reader.error(row, error) from error
    return cut_tiles(image, grid, encoder.preset.image_size)


def _no_tile(side: int) -> np.ndarray:
    return np.zeros((1, 3, side, side), dtype=np.float32)
