"""The input and the result of a stage's policies: `StageView` and `StageTransition`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sailvl_operator.api.status import StageStatus, Status
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.core.decision import Event
from sailvl_operator.core.observe import NOTHING_OBSERVED, AttemptObservation, Observed
from sailvl_operator.core.plan import PlannedStage
from sailvl_operator.core.progress import update_progress

ACTIVE = frozenset({"Starting", "Running", "Restarting", "Suspended"})
"""States of a stage that has a current attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageView:
    """Everything that a stage's policies read."""

    run: Run
    planned: PlannedStage
    status: StageStatus
    """The stage's status as it was last written."""
    latest: StageStatus
    """The status with the progress, metrics and checkpoint that the workers have reported since."""
    attempt: AttemptObservation
    """Observation of the current attempt; of a Pending stage, of its first attempt."""
    nodes: int
    """Workers of the attempt. The Job's own number counts, since edited workers apply to the next attempt."""
    defaults: Defaults
    now: float
    """Time of the reconcile in Unix seconds."""

    @property
    def is_running(self) -> bool:
        """Whether the container of every worker runs and is ready."""
        ready = {p.index for p in self.attempt.pods if p.is_ready and not p.is_gone and p.terminated is None}
        return len(ready) == self.nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTransition:
    """A stage's next status and the actions that lead there."""

    view: StageView
    status: StageStatus
    events: tuple[Event, ...] = ()
    requeue_at: float | None = None
    """Unix seconds at which the stage has to be reconciled again."""
    should_start: bool = False
    """Whether the Job of the current attempt has to be created."""
    suspend: bool | None = None
    """New value of the Job's `spec.suspend`; None leaves it unchanged."""
    should_delete_job: bool = False
    """Whether the Job is deleted gracefully, since suspending it would not last."""
    failure: str = ""
    """Why the stage, and with it the run, fails."""


def build_views(
    run: Run,
    planned_stages: Sequence[PlannedStage],
    status: Status,
    observed: Observed,
    *,
    defaults: Defaults,
    now: float,
) -> list[StageView]:
    """Build one view for each stage in the order of the spec."""
    statuses = {stage.name: stage for stage in status.stages}
    views = []
    for planned in planned_stages:
        name = planned.stage.name
        stage = statuses.get(name) or StageStatus(name=name, state="Pending")
        attempt = observed.attempts.get((name, max(1, stage.attempt)), NOTHING_OBSERVED)
        has_reports = stage.state not in ("Pending", "Succeeded")
        views.append(
            StageView(
                run=run,
                planned=planned,
                status=stage,
                latest=update_progress(stage, attempt, kind=planned.kind) if has_reports else stage,
                attempt=attempt,
                nodes=planned.nodes if attempt.job is None else attempt.job.nodes,
                defaults=defaults,
                now=now,
            )
        )
    return views


def with_status(view: StageView, status: StageStatus) -> StageView:
    """Return the view of the same attempt with another status."""
    return replace(view, status=status, latest=update_progress(status, view.attempt, kind=view.planned.kind))
