"""Suspend and resume stages: for `spec.suspend`, for a run that fails, and for a queue that preempts the workers.

The Job's own `suspend` deletes the pods with their full grace period, so that each worker saves a checkpoint. A Job
that Kueue (or another controller) suspends and resumes is deleted instead, because that controller would resume it.
"""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import Cause, LastFailure, Reason
from sailvl_operator.core.decision import Event
from sailvl_operator.core.evidence import was_checkpoint_saved
from sailvl_operator.core.failure import Diagnosis
from sailvl_operator.core.observe import PodRecord, has_live_pods
from sailvl_operator.core.restart_policy import bump_attempt, restart_or_fail
from sailvl_operator.core.stage_view import ACTIVE, StageTransition, StageView
from sailvl_operator.core.units import format_time
from sailvl_trainer.contract import ExitCode

_LOST_SECONDS = 30.0
"""Seconds after its grace period at which a pod that still exists counts as lost with its node."""


def suspend_stage(view: StageView) -> StageTransition | None:
    """Suspend an active stage of a suspended run; its state becomes Suspended once no worker runs any more."""
    if not view.run.spec.suspend:
        return None
    job = view.attempt.job
    if view.attempt.gone_job is not None and has_live_pods(view.attempt):
        return StageTransition(view=view, status=view.latest, should_delete_job=True)
    if job is not None and _is_queued(view):
        return StageTransition(view=view, status=view.latest, should_delete_job=not job.is_deleting)
    should_suspend = job is not None and not job.is_suspended
    if should_suspend or _has_workers(view) or view.status.state == "Suspended":
        return StageTransition(
            view=view,
            status=view.latest,
            suspend=True if should_suspend else None,
            requeue_at=_find_next_loss(view),
        )
    status = msgspec.structs.replace(view.latest, state="Suspended", next_attempt_time="")
    event = Event(reason=Reason.SUSPENDED, message=f"Suspended stage {status.name}; all workers have terminated")
    return StageTransition(view=view, status=status, events=(event,))


def resume_stage(view: StageView) -> StageTransition | None:
    """Resume a suspended stage with a new attempt, so that the counters of the suspended Job don't count against it."""
    if view.status.state != "Suspended" and not _was_resumed_early(view):
        return None
    status = msgspec.structs.replace(bump_attempt(view.status), state="Restarting")
    event = Event(reason=Reason.RESUMED, message=f"Resumed stage {status.name} with attempt {status.attempt}")
    return StageTransition(view=view, status=status, events=(event,))


def requeue_preempted(view: StageView) -> StageTransition | None:
    """If a queue suspended the Job of a started attempt, wait for its workers to exit and then queue a new attempt.

    Such a restart counts against no budget.
    """
    job = view.attempt.job
    if job is None or not job.is_suspended or not (view.attempt.pods or view.status.state == "Running"):
        return None
    if _has_workers(view):
        return StageTransition(view=view, status=view.latest, requeue_at=_find_next_loss(view))
    is_saved = was_checkpoint_saved(view.attempt.pods)
    failure = LastFailure(
        cause=Cause.PREEMPTED,
        attempt=view.status.attempt,
        exit_code=ExitCode.PREEMPTED if is_saved else ExitCode.TERMINATED,
        message="preempted by the queue (Kueue)",
        time=format_time(view.now),
    )
    return restart_or_fail(view, Diagnosis(failure=failure))


def suspend_with_run(transition: StageTransition) -> StageTransition:
    """Suspend a stage because its run fails; it resumes if the run does."""
    view, status = transition.view, transition.status
    if status.state not in ACTIVE or status.state == "Suspended":
        return transition
    if view.status.state in ("Pending", "Suspended"):
        return StageTransition(view=view, status=view.status)
    status = msgspec.structs.replace(status, state="Suspended", next_attempt_time="")
    return StageTransition(view=view, status=status, events=transition.events)


def _is_queued(view: StageView) -> bool:
    """Return whether Kueue or another controller suspends the Job; the run's spec may have changed since its start."""
    job = view.attempt.job
    return job is not None and (bool(job.queue) or (job.is_suspended and not job.is_suspended_here))


def _was_resumed_early(view: StageView) -> bool:
    """Return whether the operator suspended the Job and the run was resumed before the status showed the suspension."""
    job = view.attempt.job
    is_suspended_here = job is not None and job.is_suspended and not _is_queued(view)
    return is_suspended_here and not _has_workers(view)


def _has_workers(view: StageView) -> bool:
    """Return whether workers may still run; a pod on a dead node, long past its grace period, doesn't count."""
    return any(
        _may_run(pod) and not (pod.delete_by and pod.delete_by + _LOST_SECONDS <= view.now) for pod in view.attempt.pods
    )


def _find_next_loss(view: StageView) -> float | None:
    """Return the Unix seconds at which the next of the deleted pods counts as lost."""
    losses = (pod.delete_by + _LOST_SECONDS for pod in view.attempt.pods if _may_run(pod) and pod.delete_by)
    return min((loss for loss in losses if loss > view.now), default=None)


def _may_run(pod: PodRecord) -> bool:
    return not pod.is_gone and pod.terminated is None
