"""(run, observed, now) → Decision: the whole of the operator's judgement, without I/O, clock or environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from sailvl_operator.api.status import Cause, ConditionType, Reason, StageStatus, Status
from sailvl_operator.api.types import Run
from sailvl_operator.api.unsupported import unsupported
from sailvl_operator.core import goodput
from sailvl_operator.core import stage as stages
from sailvl_operator.core.decision import Attempt, Decision, Event
from sailvl_operator.core.observe import JobRecord, Observed
from sailvl_operator.core.plan import Defaults, PlannedStage, build_attempt, plan
from sailvl_operator.core.status import Verdict, decode_status, set_conditions, summarise
from sailvl_operator.core.stuck import find_stuck
from sailvl_operator.core.times import format_time


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Where the run stands after all stages took their step."""

    steps: tuple[stages.Step, ...]
    views: tuple[stages.View, ...]

    @property
    def statuses(self) -> list[StageStatus]:
        return [step.status for step in self.steps]

    @property
    def failure(self) -> str:
        return next((step.failure for step in self.steps if step.failure), "")


def reconcile(run: Run, observed: Observed, *, now: float, defaults: Defaults) -> Decision:
    """What has to be done for a run as it stands now; the same again if nothing of it was done."""
    status = decode_status(run.status)
    if run.deleting:
        return Decision()
    if status.is_finished and not _was_extended(run, status):
        return Decision(end=_leftovers(status.stages, observed))
    problems = unsupported(run.spec)
    if problems:
        message = "; ".join(f"{path}: {words}" for path, words in problems)
        return refuse(run, message, now=now)
    outcome = _step_all(run, status, observed, defaults, now)
    return _decide(run, status, outcome, observed, defaults=defaults, now=now)


def refuse(run: Run, message: str, *, now: float) -> Decision:
    """A run that can't be carried out: Failed, with what to change; a changed spec is a new chance."""
    old = decode_status(run.status)
    if old.observed_generation == run.generation and old.is_true(ConditionType.FAILED):
        return Decision()
    verdicts = _verdicts(Reason.INVALID_SPEC, message, failed=True)
    status = msgspec.structs.replace(
        old,
        observed_generation=run.generation,
        conditions=set_conditions(old, verdicts, generation=run.generation, now=now),
        summary=msgspec.structs.replace(old.summary, reason=Reason.INVALID_SPEC),
    )
    return Decision(status=status, events=(Event(reason=Reason.INVALID_SPEC, message=message[:1000], type="Warning"),))


def _was_extended(run: Run, status: Status) -> bool:
    """A finished run goes on when stages were appended; a refused one when its spec changed."""
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        return failed.reason == Reason.INVALID_SPEC and status.observed_generation != run.generation
    return len(run.spec.stages) > len(status.stages)


def _step_all(run: Run, status: Status, observed: Observed, defaults: Defaults, now: float) -> _Outcome:
    old = {s.name: s for s in status.stages}
    steps: list[stages.Step] = []
    views: list[stages.View] = []
    done: set[str] = set()
    may_begin = not run.spec.suspend
    for planned in plan(run):
        view = _view(run, planned, old, observed, defaults=defaults, now=now)
        step = _step(view, may_begin=may_begin and done.issuperset(planned.depends_on))
        if view.status.state == "Succeeded":
            done.add(view.status.name)
        may_begin = may_begin and step.status.state != "Failed"
        steps.append(step)
        views.append(view)
    return _Outcome(steps=tuple(steps), views=tuple(views))


def _view(
    run: Run,
    planned: PlannedStage,
    old: Mapping[str, StageStatus],
    observed: Observed,
    *,
    defaults: Defaults,
    now: float,
) -> stages.View:
    name = planned.stage.name
    status = old.get(name) or StageStatus(name=name, state="Pending")
    key = (name, status.attempt)
    job = observed.jobs.get(key)
    return stages.View(
        run=run,
        planned=planned,
        status=status,
        job=job if job is not None and job.owner_uid in ("", run.uid) else None,
        pods=observed.pods.get(key, ()),
        observed=observed,
        defaults=defaults,
        now=now,
    )


def _step(view: stages.View, *, may_begin: bool) -> stages.Step:
    if view.status.state in stages.ACTIVE:
        return stages.advance(view)
    if view.status.state == "Pending" and may_begin:
        return stages.begin(view)
    return stages.Step(status=view.status)


def _decide(
    run: Run, old: Status, outcome: _Outcome, observed: Observed, *, defaults: Defaults, now: float
) -> Decision:
    new = _settle(old, _build_status(run, old, outcome, now), outcome, now)
    events = tuple(event for step in outcome.steps for event in step.events) + _finish_events(old, new)
    outputs = {v.planned.stage.name: v.status.output or v.planned.directory for v in outcome.views}
    times = [step.requeue_at for step in outcome.steps if step.requeue_at is not None]
    pairs = list(zip(outcome.views, outcome.steps, strict=True))
    return Decision(
        end=_leftovers(old.stages, observed),
        suspend=tuple((v.job, s.suspend) for v, s in pairs if s.suspend is not None and v.job is not None),
        start=tuple(_start(run, view, outputs, defaults) for view, step in pairs if step.should_start),
        status=None if new == old else new,
        events=events,
        requeue_at=min(times, default=None),
    )


def _start(run: Run, view: stages.View, outputs: Mapping[str, str], defaults: Defaults) -> Attempt:
    last = view.status.last_failure
    avoid = (last.node,) if last is not None and last.cause == Cause.INFRA and last.node else ()
    return build_attempt(
        run, view.planned, attempt=view.status.attempt, outputs=outputs, defaults=defaults, avoid_nodes=avoid
    )


def _leftovers(stage_statuses: Sequence[StageStatus], observed: Observed) -> tuple[JobRecord, ...]:
    """Jobs of older attempts, and those of a stage that failed: ended at once, since hung ranks hold GPUs."""
    current = {s.name: s for s in stage_statuses}
    return tuple(
        job
        for (name, attempt), job in sorted(observed.jobs.items())
        if not job.is_deleting
        and name in current
        and (attempt < current[name].attempt or current[name].state == "Failed")
    )


def _build_status(run: Run, old: Status, outcome: _Outcome, now: float) -> Status:
    verdicts = _judge(run, outcome)
    is_over = verdicts[ConditionType.SUCCEEDED].is_true or verdicts[ConditionType.FAILED].is_true
    return Status(
        observed_generation=run.generation,
        start_time=old.start_time or format_time(now),
        completion_time=(old.completion_time or format_time(now)) if is_over else "",
        summary=summarise(
            outcome.statuses, reason=_headline(verdicts), ready=_ready(outcome), goodput=old.summary.goodput
        ),
        conditions=set_conditions(old, verdicts, generation=run.generation, now=now),
        stages=outcome.statuses,
        goodput=old.goodput,
    )


def _settle(old: Status, new: Status, outcome: _Outcome, now: float) -> Status:
    """The ledger is brought up to date with whatever else is written, and is never a reason to write."""
    if new == old:
        return old
    ledger, statuses = goodput.settle(old, outcome.views, new.stages, now=now)
    summary = msgspec.structs.replace(new.summary, goodput=goodput.share(ledger))
    return msgspec.structs.replace(new, goodput=ledger, stages=statuses, summary=summary)


def _judge(run: Run, outcome: _Outcome) -> dict[ConditionType, Verdict]:
    states = {s.state for s in outcome.statuses}
    if outcome.failure:
        return _verdicts(Reason.STAGE_FAILED, outcome.failure, failed=True)
    if states == {"Succeeded"}:
        return _verdicts(Reason.COMPLETED, f"all {len(outcome.statuses)} stages succeeded", succeeded=True)
    if run.spec.suspend:
        is_idle = not states & {"Starting", "Running", "Restarting"}
        message = "spec.suspend is true" if is_idle else "the workers save a checkpoint"
        return _verdicts(Reason.SUSPENDED, message, suspended=is_idle)
    stuck = next((s for v in outcome.views if (s := find_stuck(v.pods)) and v.status.state in stages.ACTIVE), None)
    message = ", ".join(f"{s.name} is {s.state.lower()}" for s in outcome.statuses if s.state in stages.ACTIVE)
    reason = Reason.RUNNING if "Running" in states else Reason.RESTARTING if "Restarting" in states else Reason.STARTING
    return _verdicts(reason, message, running="Running" in states, stuck=stuck)


def _verdicts(
    reason: Reason,
    message: str,
    *,
    succeeded: bool = False,
    failed: bool = False,
    running: bool = False,
    suspended: bool = False,
    stuck: tuple[Reason, str] | None = None,
) -> dict[ConditionType, Verdict]:
    """The five conditions; those that aren't true say why the run is where it is."""
    why_stuck = Verdict(is_true=True, reason=stuck[0], message=stuck[1]) if stuck else None
    return {
        ConditionType.SUCCEEDED: Verdict(is_true=succeeded, reason=reason, message=message),
        ConditionType.FAILED: Verdict(is_true=failed, reason=reason, message=message),
        ConditionType.RUNNING: Verdict(is_true=running, reason=reason, message=message),
        ConditionType.SUSPENDED: Verdict(is_true=suspended, reason=reason, message=message),
        ConditionType.STUCK: why_stuck or Verdict(is_true=False, reason=Reason.NOT_STUCK),
    }


def _headline(verdicts: Mapping[ConditionType, Verdict]) -> str:
    stuck = verdicts[ConditionType.STUCK]
    return stuck.reason if stuck.is_true else verdicts[ConditionType.RUNNING].reason


def _ready(outcome: _Outcome) -> str:
    """Workers that run, of those wanted, over the active stages."""
    active = [v for v, s in zip(outcome.views, outcome.steps, strict=True) if s.status.state in stages.ACTIVE]
    ready = sum(p.is_ready and not p.is_gone for v in active for p in v.pods)
    return f"{ready}/{sum(v.nodes for v in active)}" if active else ""


def _finish_events(old: Status, new: Status) -> tuple[Event, ...]:
    if new.is_true(ConditionType.SUCCEEDED) and not old.is_true(ConditionType.SUCCEEDED):
        return (Event(reason=Reason.COMPLETED, message=f"All {len(new.stages)} stages succeeded"),)
    return ()
