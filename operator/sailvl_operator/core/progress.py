"""Take over what the workers of the current attempt reported: progress, metrics and the newest checkpoint."""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import IN_PLACE, StageCheckpoint, StageProgress, StageStatus
from sailvl_operator.core.observe import AttemptObservation
from sailvl_operator.core.reports import find_reports
from sailvl_operator.core.units import format_decimal
from sailvl_trainer.contract import Progress

Buckets = dict[str, int]
"""Whole seconds by goodput bucket."""

MAIN_BUCKETS = {"curate": "curating", "pretrain": "training", "sft": "training", "evaluate": "evaluating"}
"""Bucket, by kind of the stage, of the time for which workers report no activity."""
ACTIVITY_BUCKETS = {
    "starting": "starting",
    "training": "training",
    "dataWait": "dataWait",
    "waiting": "dataWait",
    "checkpoint": "checkpoint",
    "evaluating": "evaluating",
}
"""Bucket of each activity of contract.Progress.seconds; other activities count as the stage's main one."""


def update_progress(status: StageStatus, attempt: AttemptObservation, *, kind: str) -> StageStatus:
    """Return a stage's status with the newest progress, metrics and checkpoint of the workers of its attempt."""
    report = attempt.progress
    if report is None:
        return msgspec.structs.replace(status, checkpoint=_find_checkpoint(status, attempt))
    known = status.progress or StageProgress()
    new_restarts = max(0, report.in_place_restarts - known.in_place_restarts)
    restarts = status.restarts
    return msgspec.structs.replace(
        status,
        restarts={**restarts, IN_PLACE: restarts.get(IN_PLACE, 0) + new_restarts} if new_restarts else restarts,
        progress=StageProgress(
            step=report.step,
            steps=report.steps,
            tokens=report.tokens,
            eta_seconds=None if report.eta_seconds is None else round(report.eta_seconds),
            seconds=count_seconds(report, kind),
            unsaved_seconds=known.unsaved_seconds,
            lost_steps=max(known.lost_steps, report.lost_steps),
            in_place_restarts=max(known.in_place_restarts, report.in_place_restarts),
        ),
        metrics={name: format_decimal(value) for name, value in report.metrics.items()},
        checkpoint=_find_checkpoint(status, attempt),
    )


def count_seconds(report: Progress, kind: str) -> Buckets:
    """Return the seconds that the workers of an attempt report, by bucket."""
    seconds: Buckets = {}
    for activity, value in report.seconds.items():
        bucket = ACTIVITY_BUCKETS.get(activity, MAIN_BUCKETS[kind])
        seconds[bucket] = seconds.get(bucket, 0) + round(value)
    return seconds


def _find_checkpoint(status: StageStatus, attempt: AttemptObservation) -> StageCheckpoint | None:
    """Return the newest checkpoint in the progress or in a termination message, else the one that is known."""
    report = attempt.progress
    reported = [
        report.checkpoint if report is not None else None,
        *(termination.checkpoint for termination in find_reports(attempt.pods)),
    ]
    newest = max((c for c in reported if c is not None), key=lambda c: c.step, default=None)
    return status.checkpoint if newest is None else StageCheckpoint(step=newest.step, path=newest.path)
