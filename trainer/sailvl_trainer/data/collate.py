"""A pack as tensors. Positions restart with every sample; attention derives its blocks from them.

Suffixes: T positions (pack_tokens), N tiles, H = W = image_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sailvl_trainer.data.chat import IGNORE
from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.index import Encoder, Index
from sailvl_trainer.data.planner import Pack
from sailvl_trainer.data.tiling import cut_tiles
from sailvl_trainer.runtime.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    input_ids_1T: torch.Tensor
    """int64, padded with the pad token."""
    labels_1T: torch.Tensor
    """int64, IGNORE where there is no loss; shifted: the label of a position is the next position's id."""
    position_ids_1T: torch.Tensor
    """int64, restarting at 0 with every sample, and with the padding."""
    pixels_N3HW: torch.Tensor
    """float32; never empty: a pack without pictures has one black tile that no position refers to."""
    samples: Pack
    tokens: int
    """Positions, padding not counted."""
    labels: int
    """Positions with loss."""


def collate(index: Index, encoder: Encoder, pack: Pack, *, pictures: Pack | None = None) -> Batch:
    """Decode and join a pack's samples. `pictures`: whose picture each sample shows; default its own.

    Raises DataError that names the shard and the record of a picture that can't be decoded.
    """
    length, pad = encoder.pack_tokens, encoder.tokenizer.pad_token_id
    input_ids_T = np.full(length, pad, dtype=np.int64)
    labels_T = np.full(length, IGNORE, dtype=np.int64)
    positions_T = np.zeros(length, dtype=np.int64)
    at, tiles = 0, []
    for sample, shown in zip(pack, pictures or pack, strict=True):
        reader, row = index.readers[index.shard_S[sample]], int(index.row_S[sample])
        encoded = encoder.encode(reader, row)
        n = len(encoded.input_ids_T)
        input_ids_T[at : at + n] = encoded.input_ids_T
        labels_T[at : at + n - 1] = encoded.labels_T[1:]
        positions_T[at : at + n] = np.arange(n)
        at += n
        if index.tiles_S[sample]:
            tiles.append(_decode(index, encoder, sample, shown))
    positions_T[at:] = np.arange(length - at)
    return Batch(
        input_ids_1T=torch.from_numpy(input_ids_T)[None],
        labels_1T=torch.from_numpy(labels_T)[None],
        position_ids_1T=torch.from_numpy(positions_T)[None],
        pixels_N3HW=torch.from_numpy(np.concatenate(tiles) if tiles else _no_tile(encoder.preset.image_size)),
        samples=pack,
        tokens=at,
        labels=int((labels_T != IGNORE).sum()),
    )


def _decode(index: Index, encoder: Encoder, sample: int, shown: int) -> np.ndarray:
    """The tiles of `shown`'s picture, cut by `sample`'s grid so that every length stays."""
    entry = index.readers[index.shard_S[sample]].rows[int(index.row_S[sample])]
    reader, row = index.readers[index.shard_S[shown]], int(index.row_S[shown])
    data = reader.image(row)
    assert data is not None, "only pictures are shown"
    try:
        image = open_image(data)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"shard {reader.path}, record {row} ({reader.rows[row]['key']}): {error}") from error
    return cut_tiles(image, encoder.grid(entry["width"], entry["height"]), encoder.preset.image_size)


def _no_tile(side: int) -> np.ndarray:
    return np.zeros((1, 3, side, side), dtype=np.float32)
