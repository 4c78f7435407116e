"""Reconcile a run that has succeeded or failed: resume it where that is possible, else clean up after it."""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import ConditionType, Reason, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core import cleanup, deadlines, restart_request
from sailvl_operator.core.decision import Decision, DeletionMode
from sailvl_operator.core.observe import Observed

_FIXABLE_BY_SPEC = frozenset({Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED})
"""Reasons of a failure that an edited spec may remove."""


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
    expiry = deadlines.find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    new = msgspec.structs.replace(
        status,
        observed_generation=run.generation,
        observed_restart_request=status.observed_restart_request if run.restart_stage else "",
    )
    dead = [
        *cleanup.find_superseded_jobs(status.stages, observed),
        *cleanup.find_unrecorded_jobs(status.stages, observed),
    ]
    suspended = cleanup.find_suspended_jobs(status.stages, observed)
    return Decision(
        deletions=(
            *cleanup.build_deletions(DeletionMode.FORCE, dead),
            *cleanup.build_deletions(DeletionMode.GRACEFUL, suspended),
        ),
        delete_run=is_expired,
        clear_restart_request=restart_request.is_handled(run, status),
        status=None if new == status else new,
        requeue_at=None if is_expired else expiry,
    )
