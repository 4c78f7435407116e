"""The order of the data as pure functions: samples → packs → optimizer steps → (microstep, rank).

The resume state holds no world size: a step is a set of packs, dealt to however many ranks there are, so a run that
comes back with another number of workers still uses every sample exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sailvl_trainer.data.index import Index
from sailvl_trainer.runtime.errors import ConfigError

Pack = tuple[int, ...]
"""Sample numbers of one packed sequence."""


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
    packs: tuple[Pack, ...]
    after: PlanState
    """The state once this step is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    tokens_S: np.ndarray
    tiles_S: np.ndarray
    fingerprint: str
    pack_tokens: int
    pack_tiles: int
    packs_per_step: int
    window_samples: int = 8192
    """Samples that are permuted and packed together: the memory of the plan."""

    def start(self, seed: int) -> PlanState:
        """Before the first step."""
        return PlanState(seed=seed, fingerprint=self.fingerprint)

    def steps(self, state: PlanState) -> Iterator[Step]:
        """All steps from a state on, epoch after epoch. Raises ConfigError for the state of other data."""
        if state.fingerprint != self.fingerprint:
            raise ConfigError(
                f"the checkpoint's data ({state.fingerprint}) is not the data given ({self.fingerprint}); "
                "restore the data, or give the stage a new name"
            )
        while True:
            plan = self.plan_window(state)
            for cursor in range(state.cursor, len(plan)):
                after = replace(state, cursor=cursor + 1)
                yield Step(packs=plan[cursor], after=self._next_window(after) if cursor + 1 == len(plan) else after)
            state = self._next_window(state)

    def plan_window(self, state: PlanState) -> list[tuple[Pack, ...]]:
        """The steps of one window: a seeded permutation, packed, and cut into steps; the last may be short."""
        order = np.random.default_rng((state.seed, state.epoch)).permutation(len(self.tokens_S))
        first = state.window * self.window_samples
        chosen = order[first : first + self.window_samples]
        packs = pack_best_fit(chosen, self.tokens_S, self.tiles_S, self.pack_tokens, self.pack_tiles)
        rng = np.random.default_rng((state.seed, state.epoch, state.window))
        shuffled = [packs[i] for i in rng.permutation(len(packs))]
        return [tuple(shuffled[i : i + self.packs_per_step]) for i in range(0, len(shuffled), self.packs_per_step)]

    def count_steps(self, seed: int) -> tuple[int, int]:
        """Steps and tokens of the first epoch."""
        state, steps = self.start(seed), 0
        while state.epoch == 0:
            steps += len(self.plan_window(state))
            state = self._next_window(state)
        return steps, int(self.tokens_S.sum())

    def _next_window(self, state: PlanState) -> PlanState:
        is_last = (state.window + 1) * self.window_samples >= len(self.tokens_S)
        if is_last:
            return replace(state, epoch=state.epoch + 1, window=0, cursor=0)
        return replace(state, window=state.window + 1, cursor=0)


def build_planner(
    index: Index, *, pack_tokens: int, pack_tiles: int, packs_per_step: int, window_samples: int = 8192
) -> Planner:
    """A planner over an index. Raises ConfigError where a sample can never fit."""
    if len(index) == 0:
        raise ConfigError("the data holds no sample; look at the curation report")
    most = int(index.tiles_S.max())
    if most > pack_tiles:
        raise ConfigError(f"a picture has {most} tiles and packTiles is {pack_tiles}; raise it or lower maxTiles")
    return Planner(
        tokens_S=index.tokens_S,
        tiles_S=index.tiles_S,
        fingerprint=index.fingerprint,
        pack_tokens=pack_tokens,
        pack_tiles=pack_tiles,
        packs_per_step=packs_per_step,
        window_samples=window_samples,
    )


def pack_best_fit(
    samples: Sequence[int] | np.ndarray, tokens_S: np.ndarray, tiles_S: np.ndarray, pack_tokens: int, pack_tiles: int
) -> list[Pack]:
    """Best fit decreasing: the longest sample first, each into the fullest pack that has room for tokens and tiles."""
    free: list[list[int]] = [[] for _ in range(pack_tokens + 1)]
    packs: list[list[int]] = []
    tiles: list[int] = []
    for sample in sorted((int(s) for s in samples), key=lambda s: (-tokens_S[s], -tiles_S[s], s)):
        need, pictures = int(tokens_S[sample]), int(tiles_S[sample])
        room = next(
            (r for r in range(need, pack_tokens + 1) if any(tiles[p] + pictures <= pack_tiles for p in free[r])), None
        )
        if room is None:
            pack, room = len(packs), pack_tokens
            packs.append([])
            tiles.append(0)
        else:
            pack = next(p for p in free[room] if tiles[p] + pictures <= pack_tiles)
            free[room].remove(pack)
        packs[pack].append(sample)
        tiles[pack] += pictures
        free[room - need].append(pack)
    return [tuple(pack) for pack in packs]


def deal(packs: Sequence[Pack], cost: np.ndarray, world_size: int) -> list[list[Pack]]:
    """Packs to (microstep, rank): sorted by cost, so that the ranks of a microstep work for equally long.

    Missing ones are empty packs: every rank takes part in every microstep, else collectives hang.
    """
    ordered = sorted(packs, key=lambda pack: (-float(cost[list(pack)].sum()), pack))
    ordered += [()] * (-len(ordered) % world_size)
    return [list(ordered[i : i + world_size]) for i in range(0, len(ordered), world_size)]
