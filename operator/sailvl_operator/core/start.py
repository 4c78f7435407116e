"""Start stages and attempts: from a Pending stage to workers that all run.

The status is the operator's memory. The first attempt's Job may exist before a status mentions the stage, while the
number of a later attempt is written before its Job is created.
"""

from __future__ import annotations

import msgspec

from sailvl_operator.api.names import DIGEST_LETTERS
from sailvl_operator.api.status import Reason
from sailvl_operator.core.decision import Event
from sailvl_operator.core.restart_policy import bump_attempt, restart_after_infra_failure
from sailvl_operator.core.stage_view import StageTransition, StageView
from sailvl_operator.core.units import format_time, parse_time


def has_started(view: StageView) -> bool:
    """Return whether the first attempt of a Pending stage has a Job or pods.

    The operator may have died between creating the Job and writing the status.
    """
    return view.attempt.job is not None or bool(view.attempt.pods)


def start_stage(view: StageView) -> StageTransition:
    """Start the first attempt of a Pending stage; its Job is created before the status is written."""
    status = msgspec.structs.replace(
        view.status,
        state="Starting",
        attempt=1,
        digest=view.planned.digest,
        output=view.planned.directory,
        start_time=format_time(view.now),
    )
    event = Event(reason=Reason.STAGE_STARTED, message=f"Started stage {status.name} (attempt 1)")
    has_job = has_started(view) or view.attempt.is_job_deleted
    return StageTransition(view=view, status=status, events=(event,), should_start=not has_job)


def replace_outdated_job(view: StageView) -> StageTransition | None:
    """Replace a first Job that was created before the spec was edited, with no status written in between."""
    job = view.attempt.job
    if job is None or job.digest in ("", view.status.digest[:DIGEST_LETTERS]):
        return None
    status = msgspec.structs.replace(bump_attempt(view.status), state="Restarting")
    message = (
        f"Job of stage {status.name} attempt {view.status.attempt} was created from an outdated spec; "
        f"replaced by attempt {status.attempt}"
    )
    return StageTransition(view=view, status=status, events=(Event(reason=Reason.RESTARTING, message=message),))


def create_job(view: StageView) -> StageTransition | None:
    """Create the Job of an attempt that has none, at once or after the backoff.

    If the Job existed before, it was deleted externally, and the attempt has failed.
    """
    if view.attempt.job is not None or view.attempt.pods:
        return None
    if view.status.state == "Running" or view.attempt.is_job_deleted:
        return restart_after_infra_failure(view, "the Job was deleted externally")
    next_attempt_time = parse_time(view.status.next_attempt_time)
    if next_attempt_time > view.now:
        return StageTransition(view=view, status=view.status, requeue_at=next_attempt_time)
    return StageTransition(view=view, status=view.status, should_start=True)


def mark_running(view: StageView) -> StageTransition | None:
    """Set the state to Running once every worker runs."""
    if view.status.state == "Running" or not view.is_running:
        return None
    status = msgspec.structs.replace(view.latest, state="Running", next_attempt_time="")
    return StageTransition(view=view, status=status)
