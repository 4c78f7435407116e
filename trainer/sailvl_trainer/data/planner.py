"""The order of the data as pure functions: samples → windows → packs → optimizer steps.

The resume state holds no world size: a step is a set of packs, dealt to however many ranks there are, so a run that
comes back with another number of workers still uses every sample exactly once an epoch. Nothing here grows with the
data set but what the caller's index holds: a window is computed from its number alone.

Suffixes: W samples of a window, B blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from sailvl_trainer.data.dataset import Index
from sailvl_trainer.data.packing import Pack, pack_best_fit
from sailvl_trainer.data.shuffle import permute
from sailvl_trainer.errors import ConfigError

BLOCK = 64
"""Neighbouring samples that come in the same window, so that storage is read in runs."""
WINDOW = 8192
"""Samples that are permuted and packed together, at least: the memory of the plan."""
STEPS_A_WINDOW = 32
"""At least so many, as the last one or two of a window may be short."""
EXACT_WINDOWS = 64
"""So many windows are planned to count steps; with more, evenly spread ones stand for the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanState:
    """Where the data stands: the next step is number `cursor` of window `window` of epoch `epoch`."""

    seed: int
    fingerprint: str
    epoch: int = 0
    window: int = 0
    cursor: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The packs of one optimizer step, over all ranks."""

    packs: tuple[Pack, ...]
    costs: tuple[float, ...]
    """Relative work of every pack."""
    tokens: int
    after: PlanState
    """The state once this step is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    samples: int
    """In the data set."""
    tokens: int
    """Of an epoch."""
    lengths: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Sample numbers to their tokens and tiles."""
    fingerprint: str
    """Of the data and of everything below."""
    pack_tokens: int
    pack_tiles: int
    packs_per_step: int
    tile_cost: float = 256.0
    """Work of a tile in the vision tower, in positions of the language model."""
    window_samples: int = WINDOW

    @property
    def windows(self) -> int:
        """Of an epoch; of equal size within a block, so that none is nearly empty."""
        return max(1, min(self._blocks, round(self.samples / self.window_samples)))

    def start(self, seed: int) -> PlanState:
        """Before the first step."""
        return PlanState(seed=seed, fingerprint=self.fingerprint)

    def steps(self, state: PlanState) -> Iterator[Step]:
        """All steps from a state on, epoch after epoch. Raises ConfigError for the state of other data."""
        if state.fingerprint != self.fingerprint:
            raise ConfigError(
                f"the checkpoint's data and packing ({state.fingerprint}) are not those given ({self.fingerprint}); "
                "restore the data and the settings, or give the stage a new name"
            )
        while True:
            plan = self.plan_window(state)
            yield from plan[state.cursor :]
            state = self._next_window(state)

    def plan_window(self, state: PlanState) -> list[Step]:
        """All steps of a state's window, whatever its cursor."""
        samples_W, rng = self._window(state)
        tokens_W, tiles_W = self.lengths(samples_W)
        packs = pack_best_fit(tokens_W, tiles_W, self.pack_tokens, self.pack_tiles)
        shuffled = [packs[i] for i in rng.permutation(len(packs))]
        steps, sizes = [], cut_steps(len(packs), self.packs_per_step)
        for cursor, at in enumerate(np.cumsum([0, *sizes[:-1]]).tolist()):
            chosen = shuffled[at : at + sizes[cursor]]
            is_last = cursor + 1 == len(sizes)
            after = self._next_window(state) if is_last else replace(state, cursor=cursor + 1)
            step = Step(
                packs=tuple(tuple(samples_W[pack].tolist()) for pack in chosen),
                costs=tuple(float(tokens_W[p].sum() + self.tile_cost * tiles_W[p].sum()) for p in chosen),
                tokens=int(sum(tokens_W[pack].sum() for pack in chosen)),
                after=after,
            )
            steps.append(step)
        return steps

    def count_steps(self, seed: int, epoch: int = 0) -> tuple[int, int]:
        """Steps and tokens of an epoch: exact up to EXACT_WINDOWS windows, else within a fraction of a percent."""
        chosen = np.unique(np.linspace(0, self.windows - 1, min(self.windows, EXACT_WINDOWS)).round().astype(int))
        state = replace(self.start(seed), epoch=epoch)
        steps = sum(len(self.plan_window(replace(state, window=int(window)))) for window in chosen)
        return round(steps * self.windows / len(chosen)), self.tokens

    def steps_for(self, seed: int, *, epochs: float | None = None, tokens: int | None = None) -> int:
        """Optimizer steps of a budget. Epochs differ by a step or so, so each one is counted."""
        if (epochs is None) == (tokens is None):
            raise ConfigError(f"epochs is {epochs} and tokens is {tokens}; give exactly one of them")
        wanted = epochs if epochs is not None else (tokens or 0) / self.tokens
        if wanted <= 0:
            raise ConfigError(f"the budget is {wanted} epochs of {self.tokens} tokens; give more than nothing")
        whole, rest = int(wanted), wanted % 1
        counted = [self.count_steps(seed, epoch)[0] for epoch in range(min(whole + 1, 4))]
        steps = sum(counted[:whole]) + max(0, whole - len(counted)) * counted[-1]
        return max(1, steps + math.ceil(rest * counted[-1]))

    @property
    def _blocks(self) -> int:
        return -(-self.samples // BLOCK)

    def _window(self, state: PlanState) -> tuple[np.ndarray, np.random.Generator]:
        """Sample numbers of a window in random order, and the generator for what is drawn further."""
        first, end = (self._blocks * (state.window + i) // self.windows for i in (0, 1))
        blocks_B = permute(np.arange(first, end), self._blocks, (state.seed, state.epoch))
        samples_W = (blocks_B[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        rng = np.random.default_rng((state.seed, state.epoch, state.window))
        return rng.permutation(samples_W[samples_W < self.samples]), rng

    def _next_window(self, state: PlanState) -> PlanState:
        if state.window + 1 < self.windows:
            return replace(state, window=state.window + 1, cursor=0)
        return replace(state, epoch=state.epoch + 1, window=0, cursor=0)


def build_planner(
    index: Index, *, pack_tokens: int, pack_tiles: int, packs_per_step: int, window_samples: int | None = None
) -> Planner:
    """A planner over an index. Raises ConfigError where a sample can never fit."""
    if len(index) == 0:
        raise ConfigError("the data holds no sample; look at the curation report")
    most = index.most_tiles
    if most > pack_tiles:
        raise ConfigError(f"a picture has {most} tiles and packTiles is {pack_tiles}; raise it or lower maxTiles")
    if window_samples is None:
        per_step = packs_per_step * pack_tokens * len(index) / index.tokens
        window_samples = max(WINDOW, round(STEPS_A_WINDOW * per_step))
    settings = f"{index.fingerprint} {pack_tokens} {pack_tiles} {packs_per_step} {window_samples}"
    return Planner(
        samples=len(index),
        tokens=index.tokens,
        lengths=index.lengths,
        fingerprint=hashlib.sha256(settings.encode()).hexdigest()[:16],
        pack_tokens=pack_tokens,
        pack_tiles=pack_tiles,
        packs_per_step=packs_per_step,
        tile_cost=float(index.tokens_per_tile),
        window_samples=window_samples,
    )


def cut_steps(packs: int, packs_per_step: int) -> list[int]:
    """Sizes of the steps of a window. A last one of less than half a step shares with the one before it."""
    sizes = [packs_per_step] * (packs // packs_per_step)
    rest = packs % packs_per_step
    if rest and sizes and rest * 2 < packs_per_step:
        both = sizes.pop() + rest
        return [*sizes, -(-both // 2), both // 2]
    return [*sizes, rest] if rest else sizes
