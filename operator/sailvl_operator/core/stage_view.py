"""What one stage's step looks at, and what comes of it; made by `reconcile`, filled in by `stage` and its policies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import IN_PLACE, StageCheckpoint, StageProgress, StageStatus
from sailvl_operator.api.types import Run
from sailvl_operator.core.activities import count_seconds
from sailvl_operator.core.decision import Event
from sailvl_operator.core.desired.workload import count_nodes
from sailvl_operator.core.failure import decode_termination
from sailvl_operator.core.observe import AttemptKey, JobRecord, Observed, PodRecord
from sailvl_operator.core.plan import PlannedStage
from sailvl_operator.core.units import format_decimal
from sailvl_trainer.contract import Progress

_MOST_LEFT_BEHIND = 10_000
"""Attempts of a run that had the name before; a number beyond is none."""
ACTIVE = frozenset({"Starting", "Running", "Restarting", "Suspended"})


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """All that one stage's step looks at."""

    run: Run
    planned: PlannedStage
    status: StageStatus
    observed: Observed
    defaults: Defaults
    now: float
    job: JobRecord | None = None
    pods: tuple[PodRecord, ...] = ()

    @property
    def key(self) -> AttemptKey:
        """Stage and attempt, as `Observed` sorts by."""
        return self.status.name, self.status.attempt

    @property
    def nodes(self) -> int:
        """Pods of the current attempt: the Job's own number, since changed workers wait for the next."""
        return self.job.nodes if self.job is not None else count_nodes(self.planned.workers)

    @property
    def is_running(self) -> bool:
        """Whether every worker's container runs."""
        ready = {p.index for p in self.pods if p.is_ready and not p.is_gone and p.terminated is None}
        return len(ready) == self.nodes


def look(view: View, status: StageStatus) -> View:
    """The same stage with another status: its attempt may be another too."""
    key = status.name, status.attempt
    found = view.observed.get(*key)
    return replace(view, status=status, job=found.job, pods=found.pods)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What became of a stage."""

    status: StageStatus
    events: tuple[Event, ...] = ()
    requeue_at: float | None = None
    should_start: bool = False
    """The current attempt's Job has to be created."""
    suspend: bool | None = None
    """What the Job's suspend has to become; None: leave it."""
    should_withdraw: bool = False
    """The Job has to go, its workers with their whole grace."""
    failure: str = ""
    """Why the run fails because of this stage."""


def read_progress(view: View) -> StageStatus:
    """The stage's status with the newest that its workers said of themselves."""
    seen = view.observed.get(*view.key).progress
    checkpoint = _find_checkpoint(view, seen)
    if seen is None:
        return msgspec.structs.replace(view.status, checkpoint=checkpoint)
    known = view.status.progress or StageProgress()
    more = max(0, seen.in_place_restarts - known.in_place_restarts)
    restarts = view.status.restarts
    return msgspec.structs.replace(
        view.status,
        restarts={**restarts, IN_PLACE: restarts.get(IN_PLACE, 0) + more} if more else restarts,
        progress=StageProgress(
            step=seen.step,
            steps=seen.steps,
            tokens=seen.tokens,
            eta_seconds=None if seen.eta_seconds is None else round(seen.eta_seconds),
            seconds=count_seconds(seen, view.planned.stage.kind),
            unsaved_seconds=known.unsaved_seconds,
            lost_steps=max(known.lost_steps, seen.lost_steps),
            in_place_restarts=max(known.in_place_restarts, seen.in_place_restarts),
        ),
        metrics={name: format_decimal(value) for name, value in sorted(seen.metrics.items())[:64]},
        checkpoint=checkpoint,
    )


def _find_checkpoint(view: View, seen: Progress | None) -> StageCheckpoint | None:
    """The newest that the workers tell of: while they run by their progress, at their end by their last words."""
    words = (decode_termination(pod) for pod in view.pods)
    told = [seen.checkpoint if seen is not None else None, *(w.checkpoint for w in words if w is not None)]
    newest = max((c for c in told if c is not None), key=lambda c: c.step, default=None)
    return view.status.checkpoint if newest is None else StageCheckpoint(step=newest.step, path=newest.path)


def next_attempt(status: StageStatus, *, after: int = 0) -> StageStatus:
    """The next number; its workers' clocks begin at zero. `after`: a number that the storage knows already, of a run
    that had this one's name."""
    progress = status.progress and msgspec.structs.replace(status.progress, seconds={}, in_place_restarts=0)
    known = after if status.attempt < after <= status.attempt + _MOST_LEFT_BEHIND else status.attempt
    return msgspec.structs.replace(status, attempt=known + 1, progress=progress)
