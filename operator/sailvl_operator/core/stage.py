"""One stage's next state, from its status and what is seen of its current attempt; called by `reconcile` for each.

The status is the memory: actions follow from the status as last written, and a new attempt's number is written before
its Job exists. So a crash between any two writes is followed by the same decision again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from sailvl_operator.api.status import (
    Cause,
    LastFailure,
    Reason,
    StageCheckpoint,
    StageProgress,
    StageStatus,
)
from sailvl_operator.api.types import Run
from sailvl_operator.core import failure, restart
from sailvl_operator.core.activities import count_seconds
from sailvl_operator.core.decision import Event
from sailvl_operator.core.desired.workload import count_nodes
from sailvl_operator.core.numbers import format_decimal, format_duration
from sailvl_operator.core.observe import JobRecord, Observed, PodRecord, parse_time
from sailvl_operator.core.plan import Defaults, PlannedStage
from sailvl_operator.core.times import format_time
from sailvl_trainer.contract import Result

ACTIVE = frozenset({"Starting", "Running", "Restarting", "Suspended"})


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """All that one stage's step looks at."""

    run: Run
    planned: PlannedStage
    status: StageStatus
    job: JobRecord | None
    pods: tuple[PodRecord, ...]
    observed: Observed
    defaults: Defaults
    now: float

    @property
    def nodes(self) -> int:
        """Pods of the current attempt: the Job's own number, since changed workers wait for the next."""
        return self.job.nodes if self.job is not None else count_nodes(self.planned.workers)

    @property
    def is_running(self) -> bool:
        """Whether every worker's container runs."""
        ready = {p.index for p in self.pods if p.is_ready and not p.is_gone and p.terminated is None}
        return len(ready) == self.nodes


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
    failure: str = field(default="")
    """Why the run fails because of this stage."""


def begin(view: View) -> Step:
    """The first attempt of a stage whose turn has come."""
    status = msgspec.structs.replace(
        view.status,
        state="Starting",
        attempt=1,
        digest=view.planned.digest,
        output=view.planned.directory,
        start_time=format_time(view.now),
    )
    return Step(status=status, events=(Event(reason=Reason.STAGE_STARTED, message=f"Stage {status.name} starts"),))


def advance(view: View) -> Step:
    """An active stage: finished, failed, suspended, to be started, or simply going on."""
    if failure.has_succeeded(view.pods, view.nodes):
        return _succeed(view)
    if view.run.spec.suspend:
        return _suspend(view)
    if view.status.state == "Suspended":
        return _resume(view)
    if view.job is None and not view.pods:
        return _start_or_wait(view)
    return _watch(view)


def _succeed(view: View) -> Step:
    result = failure.find_result(view.pods)
    if result is None:
        return _again(view, Cause.INFRA, "the result's message was lost; the stage finds its result on the storage")
    name, seconds = view.status.name, format_duration(result.seconds)
    status = msgspec.structs.replace(
        view.status,
        state="Succeeded",
        completion_time=format_time(view.now),
        output=result.output,
        memoised=result.memoised,
        metrics=_metrics(result),
        progress=StageProgress(step=result.steps, steps=result.steps, tokens=result.tokens, eta_seconds=0),
        not_before="",
    )
    words = "found its result" if result.memoised else f"succeeded in {seconds}"
    return Step(status=status, events=(Event(reason=Reason.STAGE_SUCCEEDED, message=f"Stage {name} {words}"),))


def _suspend(view: View) -> Step:
    """The Job's own suspend deletes the pods with their full grace, so each saves a checkpoint."""
    is_still_there = any(not p.is_gone and p.terminated is None for p in view.pods)
    should_suspend = view.job is not None and not view.job.is_suspended
    if is_still_there or should_suspend or view.status.state == "Suspended":
        return Step(status=_with_progress(view), suspend=True if should_suspend else None)
    status = msgspec.structs.replace(_with_progress(view), state="Suspended", not_before="")
    message = f"Stage {status.name} is suspended; its workers are gone"
    return Step(status=status, events=(Event(reason=Reason.SUSPENDED, message=message),))


def _resume(view: View) -> Step:
    """A new attempt, so that nothing of the suspended Job's bookkeeping counts against it."""
    status = msgspec.structs.replace(_next_attempt(view.status), state="Restarting")
    message = f"Stage {status.name} goes on with attempt {status.attempt}"
    return Step(status=status, events=(Event(reason=Reason.RESUMED, message=message),))


def _start_or_wait(view: View) -> Step:
    """No Job and no pod: it is to be made, now or after the backoff; if it had run before, somebody removed it."""
    if view.status.state == "Running":
        return _fail_infra(view, "the Job was removed from outside")
    not_before = parse_time(view.status.not_before)
    if not_before > view.now:
        return Step(status=view.status, requeue_at=not_before)
    return Step(status=view.status, should_start=True)


def _watch(view: View) -> Step:
    evidence = failure.collect_evidence(view.pods, was_running=view.status.state == "Running")
    if evidence:
        settled_at = min(e.at for e in evidence) + view.defaults.settle_seconds
        is_whole = len(evidence) >= view.nodes
        if not is_whole and settled_at > view.now:
            return Step(status=_with_progress(view), requeue_at=settled_at)
        return _fail_by(view, failure.diagnose(evidence))
    missing = sorted(set(range(view.nodes)) - {pod.index for pod in view.pods})
    if missing and view.status.state == "Running":
        return _fail_infra(view, f"the pod of index {missing[0]} was removed from outside")
    if view.is_running and view.status.state != "Running":
        return Step(status=msgspec.structs.replace(_with_progress(view), state="Running", not_before=""))
    return _await_start(view)


def _await_start(view: View) -> Step:
    """All pods must run within startTimeoutSeconds, else they make room and are tried again."""
    timeout = view.run.spec.restart_policy.start_timeout_seconds
    if view.status.state == "Running" or view.job is None or view.job.is_suspended or not timeout:
        return Step(status=_with_progress(view))
    deadline = view.job.created + timeout
    if view.now < deadline or any(p.terminated is not None for p in view.pods):
        return Step(status=_with_progress(view), requeue_at=deadline)
    ready = sum(p.is_ready for p in view.pods)
    message = f"{ready} of {view.nodes} workers ran within startTimeoutSeconds ({timeout})"
    return _fail_infra(view, message)


def _fail_infra(view: View, message: str) -> Step:
    """What no pod can tell of itself."""
    last = LastFailure(cause=Cause.INFRA, attempt=view.status.attempt, message=message, time=format_time(view.now))
    return _fail(view, Cause.INFRA, last)


def _fail_by(view: View, evidence: failure.Evidence) -> Step:
    last = LastFailure(
        cause=evidence.cause,
        attempt=view.status.attempt,
        rank=evidence.rank,
        node=evidence.pod.node,
        exit_code=evidence.exit_code,
        message=evidence.message,
        time=format_time(evidence.at or view.now),
    )
    return _fail(view, evidence.cause, last)


def _fail(view: View, cause: Cause, last: LastFailure) -> Step:
    """The next attempt, or the end of the run."""
    failed = msgspec.structs.replace(_with_progress(view), last_failure=last)
    if restart.may_restart(cause, failed.restarts, view.run.spec.restart_policy):
        return _again(view, cause, last.message, last)
    hint = restart.advice(cause)
    message = f"Stage {failed.name}, attempt {failed.attempt}: {cause}: {last.message}" + (f"; {hint}" if hint else "")
    status = msgspec.structs.replace(failed, state="Failed", completion_time=format_time(view.now))
    event = Event(reason=Reason.STAGE_FAILED, message=message[:1000], type="Warning")
    return Step(status=status, events=(event,), failure=message[:1000])


def _again(view: View, cause: Cause, message: str, last: LastFailure | None = None) -> Step:
    status, restarts = _with_progress(view), dict(view.status.restarts)
    key = f"{view.run.uid}/{status.name}/{status.attempt}"
    wait = restart.backoff_seconds(cause, restarts, key, view.defaults)
    restarts[cause] = restarts.get(cause, 0) + 1
    new = msgspec.structs.replace(
        _next_attempt(status),
        state="Restarting",
        restarts=restarts,
        not_before=format_time(view.now + wait) if wait else "",
        last_failure=last or status.last_failure,
    )
    words = f"Stage {status.name}, attempt {status.attempt}: {cause}: {message}; attempt {new.attempt} follows"
    event = Event(reason=Reason.RESTARTING, message=words[:1000], type="Warning")
    return Step(status=new, events=(event,))


def _next_attempt(status: StageStatus) -> StageStatus:
    """The next number; its workers' clocks begin at zero."""
    progress = status.progress and msgspec.structs.replace(status.progress, seconds={})
    return msgspec.structs.replace(status, attempt=status.attempt + 1, progress=progress)


def _with_progress(view: View) -> StageStatus:
    """The stage's status with the newest that its workers said of themselves."""
    seen = view.observed.progress.get((view.status.name, view.status.attempt))
    if seen is None:
        return view.status
    checkpoint = seen.checkpoint
    return msgspec.structs.replace(
        view.status,
        progress=StageProgress(
            step=seen.step,
            steps=seen.steps,
            tokens=seen.tokens,
            eta_seconds=None if seen.eta_seconds is None else round(seen.eta_seconds),
            seconds=count_seconds(seen, view.planned.stage.kind),
            unsaved_seconds=0 if view.status.progress is None else view.status.progress.unsaved_seconds,
        ),
        metrics={name: format_decimal(value) for name, value in sorted(seen.metrics.items())[:64]},
        checkpoint=view.status.checkpoint
        if checkpoint is None
        else StageCheckpoint(step=checkpoint.step, path=checkpoint.path),
    )


def _metrics(result: Result) -> dict[str, str]:
    return {name: format_decimal(value) for name, value in sorted(result.metrics.items())[:64]}
