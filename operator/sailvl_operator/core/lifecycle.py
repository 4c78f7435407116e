"""Advance an attempt from its start to its success: create its Job, wait for its workers, and take over their result.

All workers must run at the same time within `restartPolicy.startTimeoutSeconds`. The status is the operator's memory.
The first attempt's Job may exist before a status mentions the stage, while the number of a later attempt is written
before its Job is created.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from sailvl_operator.api.names import DIGEST_LETTERS
from sailvl_operator.api.status import Reason, StageProgress
from sailvl_operator.api.types import RestartPolicy
from sailvl_operator.core.decision import Event
from sailvl_operator.core.observe import PodRecord, has_live_pods
from sailvl_operator.core.reports import find_reports
from sailvl_operator.core.restart_policy import bump_attempt, restart_after_infra_failure
from sailvl_operator.core.stage_view import StageTransition, StageView
from sailvl_operator.core.stuck import UNSCHEDULED_GRACE_SECONDS, is_recently_unscheduled
from sailvl_operator.core.units import format_decimal, format_duration, format_time, parse_time
from sailvl_trainer.contract import Result

LOST_JOB_SECONDS = 60.0
"""Seconds within which the garbage collector deletes the pods of a deleted Job."""


def has_started(view: StageView) -> bool:
    """Return whether the first attempt of a Pending stage has a Job or pods.

    The operator may have died between creating the Job and writing the status.
    """
    attempt = view.attempt
    return attempt.job is not None or attempt.altered_job is not None or bool(attempt.pods)


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
    has_job = has_started(view) or view.attempt.gone_job is not None
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
    if has_started(view):
        return None
    if view.status.state == "Running" or view.attempt.gone_job is not None:
        return restart_after_infra_failure(view, "the Job was deleted externally, or its owner was changed")
    next_attempt_time = parse_time(view.status.next_attempt_time)
    if next_attempt_time > view.now:
        return StageTransition(view=view, status=view.status, requeue_at=next_attempt_time)
    return StageTransition(view=view, status=view.status, should_start=True)


def restart_after_alteration(view: StageView) -> StageTransition | None:
    """Restart an attempt whose Job no longer is what the operator created; the Job is deleted as superseded."""
    job = view.attempt.altered_job
    if job is None or job.is_deleting or view.status.state == "Suspended":
        return None
    return restart_after_infra_failure(view, f"Job {job.name} was altered: {job.alteration}")


def restart_after_lost_job(view: StageView) -> StageTransition | None:
    """Restart an attempt whose Job is gone, but whose workers continue: the Job lost its labels or was orphaned.

    The operator could neither suspend nor delete it. The pods of a deleted Job are deleted within seconds.
    """
    job = view.attempt.gone_job
    if job is None or not has_live_pods(view.attempt):
        return None
    deadline = job.gone_at + LOST_JOB_SECONDS
    if deadline > view.now:
        return StageTransition(view=view, status=view.latest, requeue_at=deadline)
    message = f"Job {job.name} is gone or lost its labels, but its pods still run"
    return restart_after_infra_failure(view, message)


def mark_running(view: StageView) -> StageTransition | None:
    """Set the state to Running once every worker runs."""
    if view.status.state == "Running" or not view.is_running:
        return None
    status = msgspec.structs.replace(view.latest, state="Running", next_attempt_time="")
    return StageTransition(view=view, status=status)


def restart_after_missing_pod(view: StageView) -> StageTransition | None:
    """Fail the attempt if a pod vanished without a terminal state.

    Before all pods have run, allow for late pods until the start timeout, even if one already succeeded: a worker that
    finds an existing result exits without waiting for its peers.
    """
    missing = _find_missing_index(view)
    ends = [pod.ended_seen for pod in view.attempt.pods if pod.terminated is not None]
    if missing is None or not (ends or view.status.state == "Running"):
        return None
    deadline = min(ends, default=0.0) + view.defaults.failure_settle_seconds
    if view.attempt.job is not None:
        timeout = view.run.spec.restart_policy.start_timeout_seconds or RestartPolicy().start_timeout_seconds
        deadline = max(deadline, view.attempt.job.started + timeout)
    if view.status.state != "Running" and deadline > view.now:
        return StageTransition(view=view, status=view.latest, requeue_at=deadline)
    return restart_after_infra_failure(view, f"pod {missing} was deleted externally")


def _find_missing_index(view: StageView) -> int | None:
    """Return the first index without a pod; None if every index has one."""
    present = {pod.index for pod in view.attempt.pods}
    return next((index for index in range(view.nodes) if index not in present), None)


def enforce_start_timeout(view: StageView) -> StageTransition | None:
    """Restart an attempt whose workers don't all run at the same time in time, so that they release their nodes.

    All nodes may be used again by the next attempt, because the excluded ones may be the only ones that have room. If
    the Job is missing, the time counts from the oldest pod.
    """
    started = _find_start(view)
    if view.status.state == "Running" or not started:
        return None
    reports = [
        pod.created + UNSCHEDULED_GRACE_SECONDS for pod in view.attempt.pods if is_recently_unscheduled(pod, view.now)
    ]
    timeout = view.run.spec.restart_policy.start_timeout_seconds
    if not timeout or view.now < started + timeout:
        times = [started + timeout, *reports] if timeout else reports
        return StageTransition(view=view, status=view.latest, requeue_at=min(times, default=None))
    if any(pod.terminated is not None for pod in view.attempt.pods):
        return None
    ready = sum(pod.is_ready for pod in view.attempt.pods)
    message = f"{ready} of {view.nodes} workers were ready within startTimeoutSeconds ({timeout})"
    transition = restart_after_infra_failure(view, message)
    return replace(transition, status=msgspec.structs.replace(transition.status, node_failures={}))


def _find_start(view: StageView) -> float:
    """Return the Unix seconds at which the attempt's workers could start; 0 if they may not start yet."""
    job = view.attempt.job
    if job is None:
        return min((pod.created for pod in view.attempt.pods), default=0.0)
    return 0.0 if job.is_suspended else job.started


def complete_stage(view: StageView) -> StageTransition | None:
    """Return the transition to Succeeded if every worker succeeded, and None otherwise.

    If the termination message with the result is missing, start another attempt: it finds the result on the storage.
    """
    if not has_succeeded(view.attempt.pods, view.nodes):
        return None
    result = find_result(view.attempt.pods)
    if result is None:
        message = "the result is missing in the termination message; a new attempt will read it from the storage"
        return restart_after_infra_failure(view, message)
    known_lost_steps = 0 if view.status.progress is None else view.status.progress.lost_steps
    status = msgspec.structs.replace(
        view.status,
        state="Succeeded",
        completion_time=format_time(view.now),
        output=result.output,
        reused=result.reused,
        metrics={name: format_decimal(value) for name, value in result.metrics.items()},
        progress=StageProgress(
            step=result.steps,
            steps=result.steps,
            tokens=result.tokens,
            eta_seconds=0,
            lost_steps=known_lost_steps if result.reused else max(known_lost_steps, result.lost_steps),
        ),
        next_attempt_time="",
    )
    duration = format_duration(result.seconds)
    outcome = "reused the result of an earlier run" if result.reused else f"succeeded in {duration}"
    event = Event(reason=Reason.STAGE_SUCCEEDED, message=f"Stage {status.name} {outcome}")
    return StageTransition(view=view, status=status, events=(event,))


def has_succeeded(pods: Sequence[PodRecord], nodes: int) -> bool:
    """Return whether each of the `nodes` indexes has a pod that exited with code 0."""
    done = {pod.index for pod in pods if pod.terminated is not None and pod.terminated.exit_code == 0}
    return len(done) == nodes


def find_result(pods: Sequence[PodRecord]) -> Result | None:
    """Return the stage's result from the termination message of any worker that has it."""
    return next((report.result for report in find_reports(pods) if report.result is not None), None)
