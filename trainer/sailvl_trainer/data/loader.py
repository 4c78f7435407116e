"""Optimizer steps as batches of one rank, planned and decoded ahead by threads; called by the training loop, and by
the held-out loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np

from sailvl_trainer.contract import Skip
from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.dataset import Encoder, Index
from sailvl_trainer.data.packing import Pack, deal, pack_best_fit
from sailvl_trainer.data.planner import Planner, PlanState, Step

AHEAD = 4
"""Packs that are decoded before they are asked for, at least; always whole steps."""
THREADS = 2
"""That decode; a pack's work is mostly outside Python's lock."""
HELD_OUT_SEED = 20250109


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStep:
    batches: list[Batch]
    """This rank's microbatches: equally many on every rank, some may be empty; none of a step that is left out."""
    samples: tuple[int, ...]
    """All samples of the step, over all ranks."""
    tokens: int
    """Over all ranks."""
    after: PlanState
    ready: int
    """Microbatches of this rank that were decoded when the step was asked for."""
    is_skipped: bool
    """Left out on purpose; nothing of it was read."""


def load_steps(
    planner: Planner,
    index: Index,
    encoder: Encoder,
    state: PlanState,
    *,
    rank: int,
    world_size: int,
    done: int = 0,
    skips: Sequence[Skip] = (),
    threads: int = THREADS,
) -> Iterator[LoadedStep]:
    """Steps from a state on, epoch after epoch, without end. An unreadable record raises DataError at its step.

    `done`: steps before the first one. `skips`: steps that are only planned.
    """
    planned = zip(count(done + 1), planner.steps(state))  # neither ends
    decoders = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
    plans = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
    try:
        waiting: deque[tuple[Step, list[Future[Batch]] | None]] = deque()
        coming = plans.submit(next, planned)
        while True:
            while sum(len(futures or ()) for _, futures in waiting) < AHEAD or len(waiting) < 2:
                number, step = coming.result()
                coming = plans.submit(next, planned)
                mine = [microstep[rank] for microstep in deal(step.packs, step.costs, world_size)]
                is_skipped = any(skip.first <= number <= skip.last for skip in skips)
                batches = None if is_skipped else [decoders.submit(collate, index, encoder, pack) for pack in mine]
                waiting.append((step, batches))
            ready = sum(future.done() for _, futures in waiting for future in futures or ())
            yield _finish(*waiting.popleft(), ready)
    finally:
        decoders.shutdown(wait=False, cancel_futures=True)
        plans.shutdown(wait=False, cancel_futures=True)


def held_out_batches(
    index: Index, encoder: Encoder, *, samples: int, pack_tiles: int, rank: int, world_size: int, shuffle: bool
) -> Iterator[Batch]:
    """At most so many samples, the same ones every time and from all parts of the set, in packs dealt to the ranks.

    Every rank gets equally many batches, some may be empty. `shuffle`: each sample shows another one's picture, cut
    to its own tiles so that every length stays, to see whether the model looks at it.
    """
    chosen = choose_samples(len(index), samples)
    tokens_W, tiles_W = index.lengths(chosen)
    packs = [tuple(chosen[p].tolist()) for p in pack_best_fit(tokens_W, tiles_W, encoder.pack_tokens, pack_tiles)]
    cost_W = tokens_W + index.tokens_per_tile * tiles_W
    cost_of = dict(zip(chosen.tolist(), cost_W.tolist(), strict=True))
    shown = _derange(chosen[tiles_W > 0].tolist()) if shuffle else {}
    for microstep in deal(packs, [sum(cost_of[s] for s in pack) for pack in packs], world_size):
        pack: Pack = microstep[rank]
        yield collate(index, encoder, pack, pictures=tuple(shown.get(s, s) for s in pack))


def choose_samples(total: int, number: int) -> np.ndarray:
    """So many of 0..total-1, spread at random by a fixed seed, in order."""
    return np.sort(np.random.default_rng(HELD_OUT_SEED).permutation(total)[:number])


def _derange(pictured: list[int]) -> dict[int, int]:
    """Every sample shows the picture of the one half the set away; a single one its own."""
    shift = max(1, len(pictured) // 2)
    return {sample: pictured[(i + shift) % len(pictured)] for i, sample in enumerate(pictured)}


def _finish(step: Step, futures: list[Future[Batch]] | None, ready: int) -> LoadedStep:
    """`futures`: None for a step that is left out."""
    return LoadedStep(
        batches=[future.result() for future in futures or ()],
        is_skipped=futures is None,
        samples=tuple(s for pack in step.packs for s in pack),
        tokens=step.tokens,
        after=step.after,
        ready=ready,
    )
