"""Which data is left out after a loss or a gradient that was no number; pure, called by the loop.

One step's batch at first: a broken sample is the common cause, and costs a step. If that did not help, the weights were
bad before the step: then a range around it, from a checkpoint before the range, and twice the range each further time.
PaLM (arXiv 2204.02311, §5.1) got over its spikes by going back about 100 steps and leaving out 200 to 500 batches, and
saw that neither the data nor the weights alone were to blame. So a long stage leaves out 1, 100, 200, … steps; a short
one at most a fiftieth of its steps the second time.

A step that is left out counts as done: the learning rate, the end of the stage and the batch of every other step stay
what they were, as with Megatron-LM's --iterations-to-skip. Its tokens and samples don't count as trained.
"""

from __future__ import annotations

from dataclasses import replace

from sailvl_trainer.contract import Skip

LONGEST_SECOND = 100
"""Steps of the second range, at most."""
PART = 50
"""The second range of a short stage is one part of so many."""


def widen(skips: tuple[Skip, ...], step: int, steps: int) -> tuple[Skip, ...]:
    """What to leave out after a failure at `step` of `steps`, from 1; the skip that is new or wider comes last."""
    known = next((skip for skip in skips if _is_near(skip, step, steps)), None)
    if known is None:
        return (*skips, Skip(first=step, last=step, step=step, failures=1))
    length = count_steps(known.failures + 1, steps)
    first = min(known.first, max(1, known.step - length // 2))
    last = max(known.last, step, min(steps, first + length - 1))
    wider = replace(known, first=first, last=last, failures=known.failures + 1)
    return (*(skip for skip in skips if skip != known), wider)


def count_steps(failures: int, steps: int) -> int:
    """Length of the range after so many failures at one place."""
    return 1 if failures == 1 else min(LONGEST_SECOND, max(2, steps // PART)) * 2 ** (failures - 2)


def _is_near(skip: Skip, step: int, steps: int) -> bool:
    """Within what the next wider range would reach: the same trouble goes on."""
    reach = count_steps(skip.failures + 1, steps)
    return skip.first - reach <= step <= skip.last + reach
