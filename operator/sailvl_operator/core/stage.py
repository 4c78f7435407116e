"""One stage's next state, from its status and what is seen of its current attempt; called by `reconcile` for each.

The status is the memory: actions follow from the status as last written, and a later attempt's number is written before
its Job exists. So a crash between any two writes is followed by the same decision again.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from sailvl_operator.api.names import DIGEST_LETTERS
from sailvl_operator.api.status import Cause, Reason, StageProgress
from sailvl_operator.api.types import RestartPolicy
from sailvl_operator.core import failure, restart_policy
from sailvl_operator.core.decision import Event
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.core.stage_view import ACTIVE, Step, View, look, next_attempt, read_progress
from sailvl_operator.core.stuck import PATIENCE_SECONDS, is_patient
from sailvl_operator.core.units import format_decimal, format_duration, format_time, parse_time
from sailvl_trainer.contract import WATCHDOG_INTERVAL_SECONDS, Result

_LOST_SECONDS = 30.0
"""After its grace a worker on a living node is gone."""


def begin(view: View) -> Step:
    """The first attempt of a stage whose turn has come. Its number needs no note: the Job may be made before."""
    status = msgspec.structs.replace(
        view.status,
        state="Starting",
        attempt=1,
        digest=view.planned.digest,
        output=view.planned.directory,
        start_time=format_time(view.now),
    )
    events = (Event(reason=Reason.STAGE_STARTED, message=f"Stage {status.name} starts"),)
    is_made = _has_begun(view) or view.observed.get(status.name, 1).is_job_deleted
    return Step(status=status, events=events, should_start=not is_made)


def step(view: View, *, may_begin: bool) -> Step:
    """The next state of a stage; `may_begin`: all that it waits for has succeeded.

    One whose first Job was made has begun, whatever came since: the operator that made it died before it noted that.
    """
    if view.status.state in ACTIVE:
        return advance(view)
    if view.status.state == "Pending" and (may_begin or _has_begun(view)):
        begun = begin(view)
        return begun if begun.should_start else _catch_up(view, begun)
    return Step(status=view.status)


def _catch_up(view: View, begun: Step) -> Step:
    """Workers that run before a status told of their start: one write tells of both."""
    step = advance(look(view, begun.status))
    return replace(step, events=begun.events + step.events) if step.status.state == "Running" else begun


def _has_begun(view: View) -> bool:
    """Whether the first attempt's Job is there, or has left pods."""
    first = view.observed.get(view.status.name, 1)
    return first.job is not None or bool(first.pods)


def advance(view: View) -> Step:
    """An active stage: finished, failed, suspended, to be started, or simply going on."""
    if view.job is not None and view.job.digest not in ("", view.status.digest[:DIGEST_LETTERS]):
        return _replace(view)
    if failure.has_succeeded(view.pods, view.nodes):
        return _succeed(view)
    if view.run.spec.suspend:
        return _suspend(view)
    if view.status.state == "Suspended" or _is_to_be_resumed(view):
        return _resume(view)
    if view.job is None and not view.pods:
        return _start_or_wait(view)
    return _watch(view)


def _succeed(view: View) -> Step:
    result = failure.find_result(view.pods)
    if result is None:
        return restart_policy.lose_result(view)
    name, seconds = view.status.name, format_duration(result.seconds)
    lost = 0 if view.status.progress is None else view.status.progress.lost_steps
    status = msgspec.structs.replace(
        view.status,
        state="Succeeded",
        completion_time=format_time(view.now),
        output=result.output,
        reused=result.reused,
        metrics=_metrics(result),
        progress=StageProgress(
            step=result.steps,
            steps=result.steps,
            tokens=result.tokens,
            eta_seconds=0,
            lost_steps=lost if result.reused else max(lost, result.lost_steps),
        ),
        next_attempt_time="",
    )
    words = "found its result" if result.reused else f"succeeded in {seconds}"
    return Step(status=status, events=(Event(reason=Reason.STAGE_SUCCEEDED, message=f"Stage {name} {words}"),))


def _suspend(view: View) -> Step:
    """The Job's own suspend deletes the pods with their full grace, so each saves a checkpoint. Where a queue holds
    `suspend`, it would start the Job again: there the Job goes."""
    if view.job is not None and _is_queued(view):
        return Step(status=read_progress(view), should_withdraw=not view.job.is_deleting)
    should_suspend = view.job is not None and not view.job.is_suspended
    if _has_workers(view) or should_suspend or view.status.state == "Suspended":
        suspend = True if should_suspend else None
        return Step(status=read_progress(view), suspend=suspend, requeue_at=_when_lost(view))
    status = msgspec.structs.replace(read_progress(view), state="Suspended", next_attempt_time="")
    message = f"Stage {status.name} is suspended; its workers are gone"
    return Step(status=status, events=(Event(reason=Reason.SUSPENDED, message=message),))


def _has_workers(view: View) -> bool:
    """Whether some may still run; those of a dead node, whose grace is long over, don't count."""
    return any(_may_run(pod) and not (pod.delete_by and pod.delete_by + _LOST_SECONDS <= view.now) for pod in view.pods)


def _when_lost(view: View) -> float | None:
    """When the next of the workers that were told to end would count as lost."""
    ends = (pod.delete_by + _LOST_SECONDS for pod in view.pods if _may_run(pod) and pod.delete_by)
    return min((end for end in ends if end > view.now), default=None)


def _may_run(pod: PodRecord) -> bool:
    return not pod.is_gone and pod.terminated is None


def _is_queued(view: View) -> bool:
    """Whether the Job is Kueue's, or of another who suspends Jobs: the spec may say something else by now."""
    if view.job is None:
        return False
    return bool(view.job.queue) or (view.job.is_suspended and not view.job.is_suspended_here)


def _is_to_be_resumed(view: View) -> bool:
    """Whether the Job was suspended by us, and the run was let go on before that was noted."""
    is_ours = view.job is not None and view.job.is_suspended and not _is_queued(view)
    return is_ours and not _has_workers(view)


def _replace(view: View) -> Step:
    """Its first Job was made, and then the spec was edited before a status told of it."""
    status = msgspec.structs.replace(next_attempt(view.status), state="Restarting")
    words = f"Stage {status.name}, attempt {view.status.attempt} was made of an earlier spec"
    return Step(
        status=status, events=(Event(reason=Reason.RESTARTING, message=f"{words}; attempt {status.attempt} follows"),)
    )


def _resume(view: View) -> Step:
    """A new attempt, so that nothing of the suspended Job's bookkeeping counts against it."""
    status = msgspec.structs.replace(next_attempt(view.status), state="Restarting")
    message = f"Stage {status.name} goes on with attempt {status.attempt}"
    return Step(status=status, events=(Event(reason=Reason.RESUMED, message=message),))


def _start_or_wait(view: View) -> Step:
    """No Job and no pod: it is to be made, now or after the backoff; if it was there before, somebody removed it."""
    if view.status.state == "Running" or view.observed.get(*view.key).is_job_deleted:
        return restart_policy.fail_infra(view, "the Job was removed from outside")
    next_attempt_time = parse_time(view.status.next_attempt_time)
    if next_attempt_time > view.now:
        return Step(status=view.status, requeue_at=next_attempt_time)
    return Step(status=view.status, should_start=True)


def _watch(view: View) -> Step:
    if view.job is not None and view.job.is_suspended and (view.pods or view.status.state == "Running"):
        going = Step(status=read_progress(view), requeue_at=_when_lost(view))
        return going if _has_workers(view) else restart_policy.requeue(view)
    if over := _judge(view) or _find_lost(view):
        return over
    if view.is_running and view.status.state != "Running":
        return Step(status=msgspec.structs.replace(read_progress(view), state="Running", next_attempt_time=""))
    return _await_start(view)


def _judge(view: View) -> Step | None:
    """What ended the attempt, once all its pods have had their say; None: nothing did."""
    found = failure.collect_evidence(view.pods, was_running=view.status.state == "Running")
    if not found:
        return None
    evidence = [e for e in found if not e.patience or e.seen + e.patience <= view.now]
    if not evidence:
        return Step(status=read_progress(view), requeue_at=min(e.seen + e.patience for e in found))
    settled_at = min(e.seen for e in evidence) + view.defaults.failure_settle_seconds
    if any(e.cause is Cause.STALLED for e in evidence):
        settled_at += WATCHDOG_INTERVAL_SECONDS
    if len(evidence) < view.nodes and settled_at > view.now:
        return Step(status=read_progress(view), requeue_at=settled_at)
    return restart_policy.fail_by(view, failure.diagnose(evidence), evidence)


def _find_lost(view: View) -> Step | None:
    """Pods that went unseen. As long as not all have run they may only be on their way, also when one is done already:
    whoever finds the stage's result doesn't wait for the others."""
    missing = sorted(set(range(view.nodes)) - {pod.index for pod in view.pods})
    done = [pod.ended_seen for pod in view.pods if pod.terminated is not None]
    if not missing or not (done or view.status.state == "Running"):
        return None
    settled_at = min(done, default=0.0) + view.defaults.failure_settle_seconds
    if view.job is not None:
        timeout = view.run.spec.restart_policy.start_timeout_seconds or RestartPolicy().start_timeout_seconds
        settled_at = max(settled_at, view.job.started + timeout)
    if view.status.state != "Running" and settled_at > view.now:
        return Step(status=read_progress(view), requeue_at=settled_at)
    return restart_policy.fail_infra(view, f"the pod of index {missing[0]} was removed from outside")


def _await_start(view: View) -> Step:
    """All pods must run within startTimeoutSeconds, else they make room and are tried again."""
    timeout = view.run.spec.restart_policy.start_timeout_seconds
    if view.status.state == "Running" or view.job is None or view.job.is_suspended or not view.job.started:
        return Step(status=read_progress(view))
    if not timeout:
        return Step(status=read_progress(view), requeue_at=min(_find_patience(view), default=None))
    deadline = view.job.started + timeout
    if view.now < deadline:
        return Step(status=read_progress(view), requeue_at=min([deadline, *_find_patience(view)]))
    if any(p.terminated is not None for p in view.pods):
        return Step(status=read_progress(view))
    ready = sum(p.is_ready for p in view.pods)
    message = f"{ready} of {view.nodes} workers ran within startTimeoutSeconds ({timeout})"
    return restart_policy.fail_start(view, message)


def _find_patience(view: View) -> list[float]:
    """When pods that have no node yet are old enough to be told of."""
    return [pod.created + PATIENCE_SECONDS for pod in view.pods if is_patient(pod, view.now)]


def _metrics(result: Result) -> dict[str, str]:
    return {name: format_decimal(value) for name, value in sorted(result.metrics.items())[:64]}
