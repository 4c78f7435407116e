"""Which data to skip after a non-finite loss or gradient. Pure functions; called by the trainer.

The first failure skips that step's batch alone: a broken sample is the common cause. If training fails again nearby,
the weights were already bad before the step, so a range around it is skipped, from a checkpoint before the range; each
further failure doubles the range. PaLM (arXiv 2204.02311, §5.1) overcame loss spikes by rewinding about 100 steps and
skipping 200 to 500 batches, and found neither the data nor the weights alone at fault. A long stage therefore skips 1,
100, 200, … steps; in a short one the second range is at most one fiftieth of its steps.

A skipped step counts as done: the learning rate, the end of the stage and the batch of every other step stay as they
were, as with Megatron-LM's --iterations-to-skip. Its tokens and samples don't count as trained.
"""

from __future__ import annotations

from dataclasses import replace

from sailvl_trainer.contract import Skip

MAX_SECOND_LENGTH = 100
"""Maximum length of the second range, in steps."""
SHORT_STAGE_DIVISOR = 50
"""In a short stage, the second range is the stage's steps divided by this."""


def widen_skip_window(skips: tuple[Skip, ...], step: int, steps: int) -> tuple[Skip, ...]:
    """Return the ranges to skip after a failure at `step` (from 1) of `steps`; the new or widened range comes last."""
    known = next((skip for skip in skips if _is_near(skip, step, steps)), None)
    if known is None:
        return (*skips, Skip(first=step, last=step, step=step, failures=1))
    length = skip_length(known.failures + 1, steps)
    first = min(known.first, max(1, known.step - length // 2))
    last = max(known.last, step, min(steps, first + length - 1))
    wider = replace(known, first=first, last=last, failures=known.failures + 1)
    return (*(skip for skip in skips if skip != known), wider)


def skip_length(failures: int, steps: int) -> int:
    """Return the length of the range, in steps, after so many failures at one place."""
    return 1 if failures == 1 else min(MAX_SECOND_LENGTH, max(2, steps // SHORT_STAGE_DIVISOR)) * 2 ** (failures - 2)


def _is_near(skip: Skip, step: int, steps: int) -> bool:
    """Whether a failure lies within reach of the next wider range, and so has the same origin."""
    reach = skip_length(skip.failures + 1, steps)
    return skip.first - reach <= step <= skip.last + reach
