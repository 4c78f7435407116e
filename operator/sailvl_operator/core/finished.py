"""End a run: at its deadline, after its last stage, or because its spec is rejected.

A finished run is resumed where that is possible, else it is cleaned up and deleted after ttlSecondsAfterFinished. A run
whose spec is rejected fails with the reason InvalidSpec until the spec is fixed; workers that already run continue,
because they were started from a valid spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec
from msgspec import UNSET

from sailvl_operator.api.status import ConditionType, Goodput, Reason, Status, decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.core import goodput, jobs, restart_request
from sailvl_operator.core.conditions import build_conditions, build_values
from sailvl_operator.core.decision import Decision, DeletionMode, Event
from sailvl_operator.core.observe import Observed
from sailvl_operator.core.stage_view import ACTIVE, StageTransition
from sailvl_operator.core.units import format_time, parse_time

_INACTIVE_BUCKETS = ("suspended", "queued")
"""Goodput buckets in which a run isn't active, because its workers wait for the user or for a queue."""
_FIXABLE_BY_SPEC = frozenset({Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED})
"""Reasons of a failure that an edited spec may remove."""


def find_active_seconds_left(run: Run, status: Status, stages: Sequence[StageTransition], *, now: float) -> float:
    """Return the seconds that `spec.activeDeadlineSeconds` leaves the run; infinite if it has no deadline."""
    limit = run.spec.active_deadline_seconds
    if limit is UNSET:
        return inf
    ledger, _ = goodput.account(status, stages, now=now)
    return limit - _count_active_seconds(ledger)


def _count_active_seconds(ledger: Goodput) -> int:
    """Return the seconds in which the run was neither suspended nor queued."""
    return sum(ledger.seconds.values()) - sum(ledger.seconds.get(bucket, 0) for bucket in _INACTIVE_BUCKETS)


def may_resume(run: Run, status: Status) -> bool:
    """Return whether a finished run is active again.

    A run resumes if the user requests a restart or appends a stage. A failed run also resumes if an edit of its spec
    may have removed the reason, or if this version of the operator accepts a spec that was rejected before.
    """
    if restart_request.find_request(run, status):
        return True
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        is_edited = status.observed_generation != run.generation
        return failed.reason == Reason.INVALID_SPEC or (failed.reason in _FIXABLE_BY_SPEC and is_edited)
    return len(run.spec.stages) > len(status.stages)


def reconcile_finished(run: Run, status: Status, observed: Observed, *, now: float) -> Decision:
    """Delete what is left of the workers, and the run itself after ttlSecondsAfterFinished."""
    expiry = _find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    new = msgspec.structs.replace(
        status,
        observed_generation=run.generation,
        observed_restart_request=status.observed_restart_request if run.restart_stage else "",
    )
    dead = [
        *jobs.find_superseded_jobs(status.stages, observed),
        *jobs.find_unrecorded_jobs(status.stages, observed),
    ]
    suspended = jobs.find_suspended_jobs(status.stages, observed)
    return Decision(
        deletions=(
            *jobs.build_deletions(DeletionMode.FORCE, dead),
            *jobs.build_deletions(DeletionMode.GRACEFUL, suspended),
        ),
        delete_run=is_expired,
        clear_restart_request=restart_request.is_handled(run, status),
        status=None if new == status else new,
        requeue_at=None if is_expired else expiry,
    )


def reconcile_invalid(run: Run, message: str, observed: Observed, *, now: float) -> Decision:
    """Mark the run as Failed; `message` says what to change in the spec."""
    old = decode_status(run.status)
    values = build_values(Reason.INVALID_SPEC, message, failed=True)
    conditions = build_conditions(old, values, generation=run.generation, now=now)
    if old.observed_generation == run.generation and list(old.conditions) == conditions:
        return _reconcile_rejected(run, old, observed, now)
    is_idle = not any(stage.state in ACTIVE for stage in old.stages)
    status = msgspec.structs.replace(
        old,
        observed_generation=run.generation,
        conditions=conditions,
        summary=msgspec.structs.replace(old.summary, reason=Reason.INVALID_SPEC),
        completion_time=format_time(now) if is_idle else old.completion_time,
    )
    unrecorded = jobs.find_unrecorded_jobs(old.stages, observed)
    return Decision(
        deletions=jobs.build_deletions(DeletionMode.FORCE, unrecorded),
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
    current = [observed.get(stage.name, stage.attempt).job for stage in status.stages if stage.state in ACTIVE]
    active = [job for job in current if job is not None and not job.is_suspended and not job.is_deleting]
    expiry = _find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    unrecorded = jobs.find_unrecorded_jobs(status.stages, observed)
    queued = [job for job in active if run.spec.suspend and job.queue]
    return Decision(
        deletions=(
            *jobs.build_deletions(DeletionMode.FORCE, unrecorded),
            *jobs.build_deletions(DeletionMode.GRACEFUL, queued),
        ),
        suspend=tuple((job, True) for job in active if run.spec.suspend and not job.queue),
        delete_run=is_expired,
        requeue_at=None if is_expired else expiry,
    )


def _find_expiry(run: Run, status: Status) -> float | None:
    """Return the Unix seconds at which `spec.ttlSecondsAfterFinished` deletes a finished run; None if it is kept."""
    ttl = run.spec.ttl_seconds_after_finished
    if ttl is UNSET or not status.completion_time:
        return None
    return parse_time(status.completion_time) + ttl
