"""Reconcile a run whose spec is rejected: it fails with the reason InvalidSpec until the spec is fixed.

Workers that already run continue, because they were started from a valid spec.
"""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import ConditionType, Reason, Status, decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.core import cleanup, deadlines
from sailvl_operator.core.conditions import build_conditions, build_values
from sailvl_operator.core.decision import Decision, DeletionMode, Event
from sailvl_operator.core.observe import Observed
from sailvl_operator.core.stage_view import ACTIVE
from sailvl_operator.core.units import format_time


def reconcile_invalid(run: Run, message: str, observed: Observed, *, now: float) -> Decision:
    """Mark the run as Failed; `message` says what to change in the spec."""
    old = decode_status(run.status)
    if old.observed_generation == run.generation and old.is_true(ConditionType.FAILED):
        return _reconcile_rejected(run, old, observed, now)
    is_idle = not any(stage.state in ACTIVE for stage in old.stages)
    values = build_values(Reason.INVALID_SPEC, message, failed=True)
    status = msgspec.structs.replace(
        old,
        observed_generation=run.generation,
        conditions=build_conditions(old, values, generation=run.generation, now=now),
        summary=msgspec.structs.replace(old.summary, reason=Reason.INVALID_SPEC),
        completion_time=format_time(now) if is_idle else old.completion_time,
    )
    unrecorded = cleanup.find_unrecorded_jobs(old.stages, observed)
    return Decision(
        deletions=cleanup.build_deletions(DeletionMode.FORCE, unrecorded),
        status=status,
        is_urgent=not is_idle,
        events=(Event(reason=Reason.INVALID_SPEC, message=message[:1000], type="Warning"),),
    )


def reconcile_unreadable(run: Run, message: str, observed: Observed, *, now: float) -> Decision:
    """Reject a spec that a newer version wrote and this one can't read; a run that has succeeded is left unchanged."""
    if decode_status(run.status).is_true(ConditionType.SUCCEEDED):
        return Decision()
    return reconcile_invalid(run, message, observed, now=now)


def _reconcile_rejected(run: Run, status: Status, observed: Observed, now: float) -> Decision:
    """Suspend the workers of a rejected run if its spec says so, and delete the run after ttlSecondsAfterFinished."""
    jobs = [observed.get(stage.name, stage.attempt).job for stage in status.stages if stage.state in ACTIVE]
    active = [job for job in jobs if job is not None and not job.is_suspended and not job.is_deleting]
    expiry = deadlines.find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    unrecorded = cleanup.find_unrecorded_jobs(status.stages, observed)
    queued = [job for job in active if run.spec.suspend and job.queue]
    return Decision(
        deletions=(
            *cleanup.build_deletions(DeletionMode.FORCE, unrecorded),
            *cleanup.build_deletions(DeletionMode.GRACEFUL, queued),
        ),
        suspend=tuple((job, True) for job in active if run.spec.suspend and not job.queue),
        delete_run=is_expired,
        requeue_at=None if is_expired else expiry,
    )
