"""Packs as tensors; called by the loader's threads.

Samples of a pack don't attend to each other: `position_ids_1T` restarts at 0 with every sample, and again with the
padding. Given these positions, no attention mask and no cache, transformers' Qwen2 builds the block-diagonal causal
mask itself (sdpa), or the cumulative lengths (flash attention), on CPU and GPU alike; so a batch carries no mask.

Suffixes: T tokens of a pack (pack_tokens), N tiles, H = W = image_size, S samples of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sailvl_trainer.data.chat import IGNORE_INDEX
from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.image_structure import InvalidImage
from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.packing import Pack
from sailvl_trainer.data.tiles import count_tiles, cut_tiles

MODEL_INPUTS = ("input_ids_1T", "labels_1T", "position_ids_1T", "pixels_N3HW")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One pack: a microbatch of one rank."""

    input_ids_1T: torch.Tensor
    """int64, padded with the pad token. <IMG_CONTEXT> stands for image features: tokens_per_tile per tile, in the order
    of the tiles."""
    labels_1T: torch.Tensor
    """int64, IGNORE_INDEX where there is no loss; shifted: a token's label is the next token's id."""
    position_ids_1T: torch.Tensor
    """int64, restarting at 0 with every sample, and with the padding."""
    pixels_N3HW: torch.Tensor
    """float32, never empty: a pack without images has one black tile, which no token refers to."""
    samples: Pack
    """Numbers of the samples, in the order of the pack."""
    tokens: int
    """Number of tokens, without padding."""
    loss_tokens: int
    """Number of tokens with a target."""
    tiles: int
    """Number of image tiles; 0 if the only tile is the black one."""
    attention_pairs: int
    """Number of pairs of tokens in the same sample, which attention's work is proportional to."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return replace(
            self,
            input_ids_1T=self.input_ids_1T.to(device, non_blocking=True),
            labels_1T=self.labels_1T.to(device, non_blocking=True),
            position_ids_1T=self.position_ids_1T.to(device, non_blocking=True),
            pixels_N3HW=self.pixels_N3HW.to(device, non_blocking=True),
        )

    @property
    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of PackedModel.forward."""
        return {name: getattr(self, name) for name in MODEL_INPUTS}


def collate(dataset: ShardDataset, encoder: SampleEncoder, pack: Pack, *, image_sources: Pack | None = None) -> Batch:
    """Decode a pack's samples and join them into one batch.

    `image_sources` names, for each sample, the sample whose image it shows; by default its own. Raises DataError that
    names the shard and the record that can't be read.
    """
    length, pad = encoder.pack_tokens, encoder.tokenizer.pad_token_id
    input_ids_T = np.full(length, pad, dtype=np.int64)
    labels_T = np.full(length, IGNORE_INDEX, dtype=np.int64)
    position_ids_T = np.zeros(length, dtype=np.int64)
    (tokens_S, tiles_S), start = dataset.lengths(np.array(pack, dtype=np.int64)), 0
    pixels = []
    for i, sample in enumerate(pack):
        reader, row = dataset.locate(sample)
        encoded = encoder.encode(reader, row, int(tiles_S[i]))
        n = len(encoded.input_ids_T)
        if n != tokens_S[i]:
            raise reader.error(row, f"has {n} tokens, but {tokens_S[i]} in the index; curate the data set again")
        input_ids_T[start : start + n] = encoded.input_ids_T
        labels_T[start : start + n - 1] = encoded.labels_T[1:]
        position_ids_T[start : start + n] = np.arange(n)
        start += n
        if tiles_S[i]:
            source = sample if image_sources is None else image_sources[i]
            pixels.append(_read_tiles(dataset, encoder, sample, source))
    position_ids_T[start:] = np.arange(length - start)
    return Batch(
        input_ids_1T=torch.from_numpy(input_ids_T)[None],
        labels_1T=torch.from_numpy(labels_T)[None],
        position_ids_1T=torch.from_numpy(position_ids_T)[None],
        pixels_N3HW=torch.from_numpy(np.concatenate(pixels) if pixels else _black_tile(encoder.preset.image_size)),
        samples=pack,
        tokens=start,
        loss_tokens=int((labels_T != IGNORE_INDEX).sum()),
        tiles=int(tiles_S.sum()),
        attention_pairs=int((tokens_S**2).sum()),
    )


def _read_tiles(dataset: ShardDataset, encoder: SampleEncoder, sample: int, source: int) -> np.ndarray:
    """Return the tiles of `source`'s image, cut by `sample`'s grid so that the sample's length stays."""
    own_reader, own_row = dataset.locate(sample)
    grid = encoder.grid(int(own_reader.column("width")[own_row]), int(own_reader.column("height")[own_row]))
    assert count_tiles(grid) == dataset.lengths_S["tiles"][sample], "the dataset was measured with this encoder"
    reader, row = dataset.locate(source)
    data = reader.image(row)
    assert data is not None, "only samples with an image are sources"
    try:
        with open_image(data, resized_width=grid[0] * encoder.preset.image_size) as image:
            return cut_tiles(image, grid, encoder.preset.image_size)
    except InvalidImage as error:
        raise reader.error(row, error) from error


def _black_tile(side: int) -> np.ndarray:
    return np.zeros((1, 3, side, side), dtype=np.float32)
