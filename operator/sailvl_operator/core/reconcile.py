"""(run, observed, now) → Decision: the whole of the operator's judgement, without I/O, clock or environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import msgspec
from msgspec import UNSET

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import Cause, ConditionType, Reason, StageStatus, Status, decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.api.unsupported import find_unsupported_fields
from sailvl_operator.core import deadlines, gates, goodput, restart, restart_request, stage
from sailvl_operator.core.conditions import Outcome, build_verdicts, headline, is_over, judge
from sailvl_operator.core.decision import Attempt, Decision, Event
from sailvl_operator.core.events import collect_events
from sailvl_operator.core.observe import JobRecord, Observed
from sailvl_operator.core.plan import PlannedStage, build_attempt, plan
from sailvl_operator.core.restart_policy import describe_failure, restart_by_hand
from sailvl_operator.core.stage_view import ACTIVE, Step, View, look
from sailvl_operator.core.status_throttle import put_off
from sailvl_operator.core.summary import set_conditions, summarise
from sailvl_operator.core.units import format_time

_MENDED_BY_SPEC = frozenset({Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED})
"""Reasons of a failure that a changed spec may take away."""


def reconcile(
    run: Run, observed: Observed, *, now: float, defaults: Defaults, planned: Sequence[PlannedStage] | None = None
) -> Decision:
    """What has to be done for a run as it stands now; the same again if nothing of it was done.

    `planned` is `plan(run)`, where that is known already.
    """
    status = decode_status(run.status)
    if run.deleting:
        return Decision()
    if status.is_finished and not _may_go_on(run, status):
        return _retire(run, status, observed, now)
    problems = find_unsupported_fields(run.spec)
    if problems:
        message = "; ".join(f"{path}: {words}" for path, words in problems)
        return refuse(run, message, observed, now=now)
    outcome = _step_all(run, planned or plan(run), status, observed, defaults=defaults, now=now)
    return _decide(run, status, outcome, observed, defaults=defaults, now=now)


def refuse(run: Run, message: str, observed: Observed, *, now: float) -> Decision:
    """A run that can't be carried out: Failed, with what to change; a changed spec is a new chance. Workers that run
    already go on."""
    old = decode_status(run.status)
    end = _unnoted(old.stages, observed)
    is_idle = not any(s.state in ACTIVE for s in old.stages)
    if old.observed_generation == run.generation and old.is_true(ConditionType.FAILED):
        return _keep_refused(run, old, observed, end, now)
    verdicts = build_verdicts(Reason.INVALID_SPEC, message, failed=True)
    status = msgspec.structs.replace(
        old,
        observed_generation=run.generation,
        conditions=set_conditions(old, verdicts, generation=run.generation, now=now),
        summary=msgspec.structs.replace(old.summary, reason=Reason.INVALID_SPEC),
        completion_time=format_time(now) if is_idle else old.completion_time,
    )
    event = Event(reason=Reason.INVALID_SPEC, message=message[:1000], type="Warning")
    return Decision(end=end, status=status, is_pressing=not is_idle, events=(event,))


def _keep_refused(run: Run, status: Status, observed: Observed, end: tuple[JobRecord, ...], now: float) -> Decision:
    """Of a run that was refused before: its workers stop when it is suspended, and it goes when its time has come."""
    jobs = [observed.get(s.name, s.attempt).job for s in status.stages if s.state in ACTIVE]
    going = [job for job in jobs if job is not None and not job.is_suspended and not job.is_deleting]
    expiry = deadlines.find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    return Decision(
        end=end,
        suspend=tuple((job, True) for job in going if run.spec.suspend and not job.queue),
        withdraw=tuple(job for job in going if run.spec.suspend and job.queue),
        delete_run=is_expired,
        requeue_at=None if is_expired else expiry,
    )


def refuse_unreadable(run: Run, message: str, observed: Observed, *, now: float) -> Decision:
    """A newer version wrote the spec: a run that has succeeded keeps its end."""
    if decode_status(run.status).is_true(ConditionType.SUCCEEDED):
        return Decision()
    return refuse(run, message, observed, now=now)


def _may_go_on(run: Run, status: Status) -> bool:
    """A finished run goes on when stages were appended, a failed one when its spec was mended (or this version of the
    operator can read it again) or a person asks."""
    if restart_request.find_request(run, status):
        return True
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        is_changed = status.observed_generation != run.generation
        return failed.reason == Reason.INVALID_SPEC or (failed.reason in _MENDED_BY_SPEC and is_changed)
    return len(run.spec.stages) > len(status.stages)


def _retire(run: Run, status: Status, observed: Observed, now: float) -> Decision:
    """A finished run: what is left of its workers is ended, and it goes itself when its time has come."""
    expiry = deadlines.find_expiry(run, status)
    is_expired = expiry is not None and expiry <= now
    noted = msgspec.structs.replace(
        status,
        observed_generation=run.generation,
        observed_restart_request=status.observed_restart_request if run.restart_stage else "",
    )
    return Decision(
        end=_leftovers(status.stages, observed) + _unnoted(status.stages, observed),
        withdraw=_stopped(status.stages, observed),
        delete_run=is_expired,
        take_off_request=restart_request.is_to_be_taken_off(run, status),
        status=None if noted == status else noted,
        requeue_at=None if is_expired else expiry,
    )


def _step_all(
    run: Run,
    planned_stages: Sequence[PlannedStage],
    status: Status,
    observed: Observed,
    *,
    defaults: Defaults,
    now: float,
) -> Outcome:
    old = {s.name: s for s in status.stages}
    asked = restart_request.find_request(run, status)
    steps: list[Step] = []
    views: list[View] = []
    rulings: list[gates.Ruling] = []
    done: set[str] = set()
    may_begin = not run.spec.suspend
    for planned in planned_stages:
        view = _view(run, planned, old, observed, defaults=defaults, now=now)
        step = _step(view, asked=asked, may_begin=may_begin and done.issuperset(planned.depends_on))
        ruling = gates.rule(planned.stage, step.status.metrics) if step.status.state == "Succeeded" else None
        if view.status.state == "Succeeded" and (ruling is None or ruling.opens):
            done.add(view.status.name)
        may_begin = may_begin and step.status.state != "Failed"
        steps.append(_note_gate(step, ruling))
        views.append(view)
        rulings += [ruling] if ruling is not None else []
    outcome = Outcome(views=tuple(views), steps=tuple(steps), rulings=tuple(rulings))
    outcome = replace(outcome, rest=_count_rest(run, status, outcome, now))
    return _stop_all(outcome) if outcome.failure is not None else outcome


def _view(
    run: Run,
    planned: PlannedStage,
    old: Mapping[str, StageStatus],
    observed: Observed,
    *,
    defaults: Defaults,
    now: float,
) -> View:
    name = planned.stage.name
    status = old.get(name) or StageStatus(name=name, state="Pending")
    return look(View(run=run, planned=planned, status=status, observed=observed, defaults=defaults, now=now), status)


def _step(view: View, *, asked: str, may_begin: bool) -> Step:
    may_be_asked = view.status.state == "Failed" or (view.status.state in ACTIVE and view.status.state != "Suspended")
    if asked == view.status.name and may_be_asked and not view.run.spec.suspend:
        return restart_by_hand(view)
    if view.status.state == "Failed":  # until a person asks for it
        return Step(status=view.status, failure=describe_failure(view.status))
    return stage.step(view, may_begin=may_begin)


def _note_gate(step: Step, ruling: gates.Ruling | None) -> Step:
    words = "" if ruling is None else ruling.message[:1000]
    if words == step.status.gate:
        return step
    return replace(step, status=msgspec.structs.replace(step.status, gate=words))


def _count_rest(run: Run, status: Status, outcome: Outcome, now: float) -> float:
    """Seconds until the deadline, were the run active all the time: the ledger as it would be now tells."""
    if run.spec.active_deadline_seconds is UNSET:
        return inf
    ledger, _ = goodput.settle(status, outcome.views, outcome.statuses, now=now)
    return deadlines.find_rest(run, ledger)


def _stop_all(outcome: Outcome) -> Outcome:
    """The run fails: what is still active stops where it is, and could go on from there."""
    steps = [_stop(view, step) for view, step in zip(outcome.views, outcome.steps, strict=True)]
    return replace(outcome, steps=tuple(steps))


def _stop(view: View, step: Step) -> Step:
    if step.status.state not in ACTIVE or step.status.state == "Suspended":
        return step
    if view.status.state in ("Pending", "Suspended"):
        return Step(status=view.status)
    status = msgspec.structs.replace(step.status, state="Suspended", next_attempt_time="")
    return Step(status=status, events=step.events)


def _decide(run: Run, old: Status, outcome: Outcome, observed: Observed, *, defaults: Defaults, now: float) -> Decision:
    new = _build_status(run, old, outcome, now)
    wait = put_off(old, new, interval=defaults.progress_seconds, now=now) if new != old else None
    new = old if wait is not None else _settle(run, old, new, outcome, now)
    times = [step.requeue_at for step in outcome.steps] + [now + outcome.rest if outcome.rest < inf else None, wait]
    pairs = list(zip(outcome.views, outcome.steps, strict=True))
    leftovers = _leftovers(old.stages, observed)
    return Decision(
        clear=tuple(job for job in leftovers if not _is_dead(job, observed)),
        end=tuple(job for job in leftovers if _is_dead(job, observed)),
        suspend=tuple((v.job, s.suspend) for v, s in pairs if s.suspend is not None and v.job is not None),
        withdraw=tuple(v.job for v, s in pairs if s.should_withdraw and v.job is not None),
        start=_build_starts(outcome),
        serve=not observed.has_service and _needs_service(outcome),
        take_off_request=restart_request.is_to_be_taken_off(run, old),
        status=None if new == old else new,
        is_pressing=new.is_finished or any(_is_awaited(v.status, s.status) for v, s in pairs),
        events=collect_events(run, old, new, outcome),
        requeue_at=min((t for t in times if t is not None and not new.is_finished), default=None),
    )


def _is_awaited(old: StageStatus, new: StageStatus) -> bool:
    has_ended = new.state != old.state and new.state in ("Succeeded", "Failed")
    return has_ended or new.attempt > max(1, old.attempt)


def _needs_service(outcome: Outcome) -> bool:
    """Workers find each other by it; one alone needs none."""
    pairs = zip(outcome.views, outcome.steps, strict=True)
    return any(step.status.state in ACTIVE and view.nodes > 1 for view, step in pairs)


def _build_starts(outcome: Outcome) -> tuple[Attempt, ...]:
    outputs = {v.planned.stage.name: v.status.output or v.planned.directory for v in outcome.views}
    pairs = zip(outcome.views, outcome.steps, strict=True)
    return tuple(_start(view, step.status, outputs) for view, step in pairs if step.should_start)


def _start(view: View, status: StageStatus, outputs: Mapping[str, str]) -> Attempt:
    """What has begun goes on as what it began: an edit of the workers, or another version of the operator, may have
    changed what the stage would be now."""
    planned = replace(view.planned, digest=status.digest, directory=status.output)
    last = status.last_failure
    avoided = restart.avoided_nodes(status, view.run.spec.restart_policy)
    is_doubted = last is not None and last.cause == Cause.INFRA and last.node and last.node not in avoided
    return build_attempt(
        view.run,
        planned,
        attempt=status.attempt,
        outputs=outputs,
        defaults=view.defaults,
        avoid_nodes=avoided,
        doubted_nodes=(last.node,) if is_doubted and last is not None else (),
    )


def _leftovers(stage_statuses: Sequence[StageStatus], observed: Observed) -> tuple[JobRecord, ...]:
    """Jobs of older attempts, and those of stages that failed: ended at once, since hung ranks hold GPUs."""
    current = {s.name: s for s in stage_statuses}
    return tuple(
        job
        for job in observed.jobs
        if not job.is_deleting
        and job.stage in current
        and (job.attempt < current[job.stage].attempt or current[job.stage].state == "Failed")
    )


def _is_dead(job: JobRecord, observed: Observed) -> bool:
    """Whether its gang can't run any more: a worker is lost, and no queue would start the Job again."""
    pods = observed.get(job.stage, job.attempt).pods
    return not job.queue and any(pod.is_gone or pod.terminated is not None for pod in pods)


def _stopped(stage_statuses: Sequence[StageStatus], observed: Observed) -> tuple[JobRecord, ...]:
    """Jobs of the stages that stopped with their run: their workers save a checkpoint."""
    jobs = (observed.get(s.name, s.attempt).job for s in stage_statuses if s.state == "Suspended")
    return tuple(job for job in jobs if job is not None and not job.is_deleting)


def _unnoted(stage_statuses: Sequence[StageStatus], observed: Observed) -> tuple[JobRecord, ...]:
    """First Jobs that were made just before the run ended or was refused, and that its status never told of."""
    known = {s.name for s in stage_statuses if s.attempt > 0}
    return tuple(job for job in observed.jobs if job.stage not in known and not job.is_deleting)


def _build_status(run: Run, old: Status, outcome: Outcome, now: float) -> Status:
    verdicts = judge(run, outcome)
    return Status(
        observed_generation=run.generation,
        start_time=old.start_time or format_time(now),
        completion_time=(old.completion_time or format_time(now)) if is_over(verdicts) else "",
        summary=summarise(
            outcome.statuses, reason=headline(verdicts), ready=_ready(outcome), goodput=old.summary.goodput
        ),
        conditions=set_conditions(old, verdicts, generation=run.generation, now=now),
        stages=outcome.statuses,
        goodput=old.goodput,
        observed_restart_request=run.restart_stage[: restart_request.NOTE_LENGTH],
    )


def _settle(run: Run, old: Status, new: Status, outcome: Outcome, now: float) -> Status:
    """The ledger is brought up to date with whatever else is written, and is never a reason to write."""
    if new == old or (old.completion_time and new.completion_time):
        return new
    ledger, statuses = goodput.settle(old, outcome.views, new.stages, now=now)
    ledger = goodput.price(ledger, run.spec.price_per_gpu_hour)
    summary = msgspec.structs.replace(new.summary, goodput=goodput.share(ledger))
    return msgspec.structs.replace(new, goodput=ledger, stages=statuses, summary=summary)


def _ready(outcome: Outcome) -> str:
    """Workers that run, of those wanted, over the active stages."""
    pairs = zip(outcome.views, outcome.steps, strict=True)
    active = [_see_begun(view, step) for view, step in pairs if step.status.state in ACTIVE]
    ready = sum(p.is_ready and not p.is_gone for v in active for p in v.pods)
    return f"{ready}/{sum(v.nodes for v in active)}" if active else ""


def _see_begun(view: View, step: Step) -> View:
    """Workers of a stage that begins may be there already."""
    return look(view, step.status) if view.status.state == "Pending" else view
