"""The data loader: this rank's batches of each optimizer step, planned and decoded ahead of time by threads.

1. A planning thread computes the next step: the packs of all ranks, the same on every rank.
2. The packs are assigned to the ranks by cost; this rank keeps its own.
3. Decoding threads turn its packs into tensors, at least PREFETCH_PACKS packs and two steps ahead.
4. Steps are yielded in order, epoch after epoch; a skipped step is only planned, and none of its data is read.

The price: every rank plans the packs of all ranks, about 30 µs per sample and step on one core, and holds two or more
steps of its decoded packs in memory. In return ranks need not communicate, and any step can be resumed from exactly.
Called by the trainer, and for the validation loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np

from sailvl_trainer.contract import Skip
from sailvl_trainer.data.collate import Batch, collate
from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.packing import Pack, assign_to_ranks, pack_best_fit
from sailvl_trainer.data.planner import DataPosition, PlannedStep, Planner

PREFETCH_PACKS = 4
"""Minimum number of this rank's packs that are decoded ahead; always whole steps."""
DECODE_THREADS = 2
"""Number of decoding threads; their work runs mostly outside Python's global lock."""
SUBSET_SEED = 20250109
"""Seed of the validation samples, equal in all runs so that their losses can be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStep:
    """One optimizer step, with this rank's batches."""

    batches: list[Batch]
    """This rank's microbatches: the same number on every rank, some possibly empty; none in a skipped step."""
    samples: tuple[int, ...]
    """Numbers of all samples of the step, over all ranks."""
    tokens: int
    """Number of tokens over all ranks, without padding."""
    next_position: DataPosition
    """Position in the data after this step."""
    ready_batches: int
    """Number of this rank's microbatches that were decoded when the step was requested."""
    is_skipped: bool
    """Whether the step's data is skipped on purpose and wasn't read."""


def load_steps(
    planner: Planner,
    dataset: ShardDataset,
    encoder: SampleEncoder,
    position: DataPosition,
    *,
    rank: int,
    world_size: int,
    first_step: int = 1,
    skips: Sequence[Skip] = (),
    threads: int = DECODE_THREADS,
) -> Iterator[LoadedStep]:
    """Yield all steps from a position on, epoch after epoch, without end.

    `first_step` is the number of the first step; `skips` are ranges of step numbers. Raises DataError at the step that
    holds an invalid record.
    """
    numbered = zip(count(first_step), planner.plan_steps(position))  # both iterators are infinite
    decoders = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
    planners = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
    try:
        queue: deque[tuple[PlannedStep, list[Future[Batch]] | None]] = deque()
        next_planned = planners.submit(next, numbered)
        while True:
            while sum(len(futures or ()) for _, futures in queue) < PREFETCH_PACKS or len(queue) < 2:
                number, step = next_planned.result()
                next_planned = planners.submit(next, numbered)
                own_packs = [packs[rank] for packs in assign_to_ranks(step.packs, step.costs, world_size)]
                is_skipped = any(skip.first <= number <= skip.last for skip in skips)
                futures = None if is_skipped else [decoders.submit(collate, dataset, encoder, p) for p in own_packs]
                queue.append((step, futures))
            ready = sum(future.done() for _, futures in queue for future in futures or ())
            yield _finish_step(*queue.popleft(), ready)
    finally:
        decoders.shutdown(wait=False, cancel_futures=True)
        planners.shutdown(wait=False, cancel_futures=True)


def load_validation_batches(
    dataset: ShardDataset,
    encoder: SampleEncoder,
    *,
    samples: int,
    pack_tiles: int,
    rank: int,
    world_size: int,
    shuffle_images: bool,
) -> Iterator[Batch]:
    """Yield this rank's batches of at most `samples` samples, the same ones every time, drawn from the whole set.

    Every rank gets the same number of batches, some possibly empty. With `shuffle_images`, each sample shows another
    sample's image, cut by its own grid so that all lengths stay: a test of whether the model uses the image.
    """
    chosen_W = sample_subset(len(dataset), samples)
    tokens_W, tiles_W = dataset.lengths(chosen_W)
    packs = [tuple(chosen_W[p].tolist()) for p in pack_best_fit(tokens_W, tiles_W, encoder.pack_tokens, pack_tiles)]
    cost_W = tokens_W + dataset.tokens_per_tile * tiles_W
    cost_by_sample = dict(zip(chosen_W.tolist(), cost_W.tolist(), strict=True))
    shuffled = _shuffle_images(chosen_W[tiles_W > 0].tolist()) if shuffle_images else {}
    costs = [sum(cost_by_sample[s] for s in pack) for pack in packs]
    for rank_packs in assign_to_ranks(packs, costs, world_size):
        pack: Pack = rank_packs[rank]
        yield collate(dataset, encoder, pack, image_sources=tuple(shuffled.get(s, s) for s in pack))


def sample_subset(total: int, size: int) -> np.ndarray:
    """Return `size` of the numbers 0..total-1, drawn at random with a fixed seed, in ascending order."""
    return np.sort(np.random.default_rng(SUBSET_SEED).permutation(total)[:size])


def _shuffle_images(with_image: list[int]) -> dict[int, int]:
    """Map every sample to the one half the list away, whose image it shows; a single sample keeps its own."""
    shift = max(1, len(with_image) // 2)
    return {sample: with_image[(i + shift) % len(with_image)] for i, sample in enumerate(with_image)}


def _finish_step(step: PlannedStep, futures: list[Future[Batch]] | None, ready_batches: int) -> LoadedStep:
    """Wait for a step's batches; `futures` is None for a skipped step."""
    return LoadedStep(
        batches=[future.result() for future in futures or ()],
        is_skipped=futures is None,
        samples=tuple(s for pack in step.packs for s in pack),
        tokens=step.tokens,
        next_position=step.next_position,
        ready_batches=ready_batches,
    )
