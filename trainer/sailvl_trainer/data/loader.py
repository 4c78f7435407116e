"""Optimizer steps as batches of one rank, decoded ahead by threads; called by the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.index import Encoder, Index
from sailvl_trainer.data.planner import Pack, Planner, PlanState, Step, deal, pack_best_fit

AHEAD = 3
"""Steps that are decoded before they are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStep:
    batches: list[Batch]
    """This rank's microbatches."""
    samples: tuple[int, ...]
    """All samples of the step, over all ranks."""
    tokens: int
    """Over all ranks."""
    after: PlanState


def load_steps(
    planner: Planner, index: Index, encoder: Encoder, state: PlanState, *, rank: int, world_size: int
) -> Iterator[LoadedStep]:
    """Steps from a state on, without end."""
    cost_S = estimate_cost(index)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Step, list[Future[Batch]]]] = deque()
        for step in planner.steps(state):
            mine = [microstep[rank] for microstep in deal(step.packs, cost_S, world_size)]
            waiting.append((step, [pool.submit(collate, index, encoder, pack) for pack in mine]))
            if len(waiting) > AHEAD:
                yield _finish(*waiting.popleft(), index)


def held_out_batches(
    index: Index, encoder: Encoder, *, samples: int, pack_tiles: int, rank: int, world_size: int, shuffle: bool
) -> Iterator[Batch]:
    """The first `samples` samples in packs, dealt to the ranks; every rank gets equally many, some may be empty.

    `shuffle`: each sample shows another one's picture, to see whether the model looks at it.
    """
    chosen = np.arange(min(samples, len(index)))
    packs = pack_best_fit(chosen, index.tokens_S, index.tiles_S, encoder.pack_tokens, pack_tiles)
    shown = _derange(index, chosen) if shuffle else {}
    for microstep in deal(packs, estimate_cost(index), world_size):
        pack: Pack = microstep[rank]
        yield collate(index, encoder, pack, pictures=tuple(shown.get(s, s) for s in pack))


def estimate_cost(index: Index) -> np.ndarray:
    """Relative work of every sample: a tile's vision forward is about that of its positions in the language model."""
    return index.tokens_S + 256.0 * index.tiles_S


def _derange(index: Index, chosen: np.ndarray) -> dict[int, int]:
    """Every sample with a picture shows that of the next one half the set away."""
    pictured = [int(s) for s in chosen if index.tiles_S[s]]
    shift = max(1, len(pictured) // 2)
    return {s: pictured[(i + shift) % len(pictured)] for i, s in enumerate(pictured)}


def _finish(step: Step, futures: list[Future[Batch]], index: Index) -> LoadedStep:
    samples = tuple(s for pack in step.packs for s in pack)
    return LoadedStep(
        batches=[future.result() for future in futures],
        samples=samples,
        tokens=int(index.tokens_S[list(samples)].sum()),
        after=step.after,
    )
