"""The order of the data as pure functions: samples → windows → packs → optimizer steps.

1. An epoch is a pseudorandom permutation of blocks of neighbouring samples, divided into windows of equal size.
2. A window's samples are shuffled and packed, and the packs are shuffled.
3. Consecutive packs form the window's optimizer steps.

A window is computed from its number alone, so memory doesn't grow with the data set, and a position is three numbers.
The position holds no world size: a step is a set of packs, assigned to any number of ranks, so that a resume with
another number of workers still uses every sample exactly once per epoch. The price: samples are shuffled within a
window only, and a window's last step may have fewer packs than the others.

Suffixes: W samples of a window, B blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.packing import Pack, pack_best_fit
from sailvl_trainer.errors import ConfigError

BLOCK_SAMPLES = 64
"""Neighbouring samples that are in the same window, so that storage is read in contiguous runs."""
WINDOW_SAMPLES = 8192
"""Minimum number of samples that are shuffled and packed together; the memory of the plan grows with it."""
STEPS_PER_WINDOW = 32
"""Minimum number of steps per window, since the last one or two may be short."""
MAX_COUNTED_WINDOWS = 64
"""Maximum number of windows that are planned to count an epoch's steps; of more, evenly spaced ones are planned."""
FEISTEL_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPosition:
    """Position in the data: the next step is number `cursor` of window `window` of epoch `epoch`."""

    seed: int
    fingerprint: str
    """Fingerprint of the planner that the position belongs to."""
    epoch: int = 0
    window: int = 0
    cursor: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """The packs of one optimizer step, over all ranks."""

    packs: tuple[Pack, ...]
    costs: tuple[float, ...]
    """Relative cost of each pack, in tokens of the language model."""
    tokens: int
    """Number of tokens, without padding."""
    next_position: DataPosition
    """Position in the data after this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """Computes the steps of any window of any epoch from the sample lengths."""

    samples: int
    """Number of samples in the dataset."""
    tokens: int
    """Number of tokens of an epoch."""
    lengths: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Function from sample numbers to their tokens and tiles."""
    fingerprint: str
    """Hash of the data and of all settings below."""
    pack_tokens: int
    pack_tiles: int
    packs_per_step: int
    tile_cost: float = 256.0
    """Cost of a tile in the vision tower, in tokens of the language model."""
    window_samples: int = WINDOW_SAMPLES

    @property
    def windows(self) -> int:
        """Number of windows of an epoch; their sizes differ by one block at most."""
        return max(1, min(self._blocks, round(self.samples / self.window_samples)))

    def first_position(self, seed: int) -> DataPosition:
        """Return the position of the first step."""
        return DataPosition(seed=seed, fingerprint=self.fingerprint)

    def plan_steps(self, position: DataPosition) -> Iterator[PlannedStep]:
        """Yield all steps from a position on, epoch after epoch, without end.

        Raises ConfigError if the position belongs to other data or settings.
        """
        if position.fingerprint != self.fingerprint:
            raise ConfigError(
                f"the checkpoint's data or packing settings ({position.fingerprint}) differ from the stage's "
                f"({self.fingerprint}); restore the data and the settings, or give the stage a new name"
            )
        while True:
            steps = self.plan_window(position)
            yield from steps[position.cursor :]
            position = self._next_window(position)

    def plan_window(self, position: DataPosition) -> list[PlannedStep]:
        """Return all steps of the position's window, including those before its cursor."""
        samples_W, rng = self._shuffle_window(position)
        tokens_W, tiles_W = self.lengths(samples_W)
        packs = pack_best_fit(tokens_W, tiles_W, self.pack_tokens, self.pack_tiles)
        shuffled = [packs[i] for i in rng.permutation(len(packs))]
        steps, sizes = [], split_window(len(packs), self.packs_per_step)
        for cursor, first in enumerate(np.cumsum([0, *sizes[:-1]]).tolist()):
            step_packs = shuffled[first : first + sizes[cursor]]
            is_last = cursor + 1 == len(sizes)
            step = PlannedStep(
                packs=tuple(tuple(samples_W[pack].tolist()) for pack in step_packs),
                costs=tuple(float(tokens_W[p].sum() + self.tile_cost * tiles_W[p].sum()) for p in step_packs),
                tokens=int(sum(tokens_W[pack].sum() for pack in step_packs)),
                next_position=self._next_window(position) if is_last else replace(position, cursor=cursor + 1),
            )
            steps.append(step)
        return steps

    def count_steps(self, seed: int, epoch: int = 0) -> tuple[int, int]:
        """Return the steps and tokens of an epoch.

        Exact up to MAX_COUNTED_WINDOWS windows; with more, the steps are accurate to a fraction of a percent.
        """
        chosen = np.linspace(0, self.windows - 1, min(self.windows, MAX_COUNTED_WINDOWS)).round().astype(int)
        windows = np.unique(chosen)
        position = replace(self.first_position(seed), epoch=epoch)
        steps = sum(len(self.plan_window(replace(position, window=int(window)))) for window in windows)
        return round(steps * self.windows / len(windows)), self.tokens

    def num_steps(self, seed: int, *, epochs: float | None = None, tokens: int | None = None) -> int:
        """Return the optimizer steps of a budget, in which each epoch is counted: they may differ by a step.

        Raises ConfigError unless exactly one of `epochs` and `tokens` is given, and positive.
        """
        if (epochs is None) == (tokens is None):
            raise ConfigError(f"epochs is {epochs} and tokens is {tokens}; set exactly one of them")
        budget = epochs if epochs is not None else (tokens or 0) / self.tokens
        if budget <= 0:
            raise ConfigError(f"the budget is {budget} epochs of {self.tokens} tokens; set more than 0")
        whole, fraction = int(budget), budget % 1
        counted = [self.count_steps(seed, epoch)[0] for epoch in range(min(whole + 1, 4))]
        steps = sum(counted[:whole]) + max(0, whole - len(counted)) * counted[-1]
        return max(1, steps + math.ceil(fraction * counted[-1]))

    @property
    def _blocks(self) -> int:
        return -(-self.samples // BLOCK_SAMPLES)

    def _shuffle_window(self, position: DataPosition) -> tuple[np.ndarray, np.random.Generator]:
        """Return a window's sample numbers in random order, and the generator for the shuffle of its packs."""
        first, end = (self._blocks * (position.window + i) // self.windows for i in (0, 1))
        blocks_B = permute(np.arange(first, end), self._blocks, (position.seed, position.epoch))
        samples_W = (blocks_B[:, None] * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES)).ravel()
        rng = np.random.default_rng((position.seed, position.epoch, position.window))
        return rng.permutation(samples_W[samples_W < self.samples]), rng

    def _next_window(self, position: DataPosition) -> DataPosition:
        if position.window + 1 < self.windows:
            return replace(position, window=position.window + 1, cursor=0)
        return replace(position, epoch=position.epoch + 1, window=0, cursor=0)


def build_planner(
    dataset: ShardDataset, *, pack_tokens: int, pack_tiles: int, packs_per_step: int, window_samples: int | None = None
) -> Planner:
    """Return the planner of a dataset. Raises ConfigError if the dataset is empty, or an image can't fit a pack."""
    if len(dataset) == 0:
        raise ConfigError("the data set is empty; see the curation report")
    if dataset.max_tiles > pack_tiles:
        raise ConfigError(
            f"an image has {dataset.max_tiles} tiles but packTiles is {pack_tiles}; raise packTiles or lower maxTiles"
        )
    if window_samples is None:
        samples_per_step = packs_per_step * pack_tokens * len(dataset) / dataset.tokens
        window_samples = max(WINDOW_SAMPLES, round(STEPS_PER_WINDOW * samples_per_step))
    settings = f"{dataset.fingerprint} {pack_tokens} {pack_tiles} {packs_per_step} {window_samples}"
    return Planner(
        samples=len(dataset),
        tokens=dataset.tokens,
        lengths=dataset.lengths,
        fingerprint=hashlib.sha256(settings.encode()).hexdigest()[:16],
        pack_tokens=pack_tokens,
        pack_tiles=pack_tiles,
        packs_per_step=packs_per_step,
        tile_cost=float(dataset.tokens_per_tile),
        window_samples=window_samples,
    )


def split_window(packs: int, packs_per_step: int) -> list[int]:
    """Return the sizes of a window's steps. A remainder of less than half a step is shared with the step before it."""
    sizes = [packs_per_step] * (packs // packs_per_step)
    remainder = packs % packs_per_step
    if remainder and sizes and remainder * 2 < packs_per_step:
        shared = sizes.pop() + remainder
        return [*sizes, -(-shared // 2), shared // 2]
    return [*sizes, remainder] if remainder else sizes


def permute(indices: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """Return the elements at the given indices of the permutation of 0..n-1 with this key, as int64.

    The elements are computed one by one, without memory: a Feistel network over the next even power of two is repeated
    until the result is below n (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002).
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    round_keys = np.random.default_rng(key).integers(0, 2**63, FEISTEL_ROUNDS, dtype=np.uint64)
    found = _apply_feistel_network(indices.astype(np.uint64), half, round_keys)
    while (outside := found >= n).any():
        found[outside] = _apply_feistel_network(found[outside], half, round_keys)
    return found.astype(np.int64)


def _apply_feistel_network(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        mixed = (right + round_key) * _ODD  # arrays of uint64 wrap around
        mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
    return (left << half) | right
