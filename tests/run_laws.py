"""What must hold of a run whatever happens to it.

Laws of single writes are checked as each is made, laws of the world between the steps of the random walk, which adds
seed, step and history to the words of a broken law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from model_api import ModelApi, Object, Write, may_run, owner_of
from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_spec
from sailvl_operator.api.status import ConditionType, Reason, StageStatus, Status
from sailvl_operator.core.observe import parse_time
from sailvl_operator.core.plan import plan
from sailvl_operator.core.restart import budget

TRANSITION_SECONDS = 60.0
"""How long two attempts of a stage may both be alive while an operator serves the run."""
REMEMBERED_SECONDS = 60.0
"""How long after a run's end an operator may still act for it."""
_FINISHED = ("Succeeded", "Failed")
_MENDED_BY_SPEC = (Reason.INVALID_SPEC, Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED)


class BrokenLawError(AssertionError):
    """Says which."""


@dataclass(kw_only=True)
class Ledger:
    """What the laws remember of the walk so far."""

    api: ModelApi
    monotonic: Callable[[], float]
    created: dict[tuple[str, str], str] = field(default_factory=dict)
    """uid of the Job that was made for a run's uid under a name."""
    removed_by: dict[str, str] = field(default_factory=dict)
    """Who removed an object, by its uid."""
    removed_at: dict[str, float] = field(default_factory=dict)
    """When, in seconds of no clock that jumps."""
    operators: set[str] = field(default_factory=set)
    doubled_since: dict[tuple[str, str], float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """Laws and how they were broken; who writes must not stumble over it."""

    def see(self, write: Write) -> None:
        """Check a write against what was, then remember it."""
        if write.plural == "jobs" and write.verb == "create":
            for law in JOB_LAWS:
                self.check(law, self, write.object)
            self.created[owner_of(write.object), write.object["metadata"]["name"]] = write.object["metadata"]["uid"]
        if write.plural == "sailvlruns" and write.verb == "update" and write.by in self.operators:
            old, new = _status(write.before), _status(write.after)
            for status_law in STATUS_LAWS if old != new else ():
                self.check(status_law, write.object, old, new)
        if write.verb == "remove":
            uid = write.object["metadata"]["uid"]
            self.removed_by[uid], self.removed_at[uid] = write.by, self.monotonic()

    def check(self, law: Callable[..., None], *what: object) -> None:
        """Note it when it doesn't hold."""
        try:
            law(*what)
        except BrokenLawError as broken:
            self.broken.append(f"{law.__name__.replace('_', ' ')}: {broken}")


# Laws of a new Job.


def jobs_belong_to_a_living_run(ledger: Ledger, job: Object) -> None:
    uid = owner_of(job)
    if ledger.api.find("sailvlruns", uid) is None:
        late = ledger.monotonic() - ledger.removed_at[uid]
        _hold(late <= REMEMBERED_SECONDS, f"{_name(job)} was made for run {uid}, removed {late:.0f} s ago")


def a_later_attempt_is_in_the_status_before_its_job(ledger: Ledger, job: Object) -> None:
    stage = _stage_of(ledger, job)
    if stage is not None:
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        _hold(number <= max(1, stage.attempt), f"{_name(job)} was made while the status says attempt {stage.attempt}")


def no_job_is_made_twice(ledger: Ledger, job: Object) -> None:
    """But one that somebody else removed, or that was withdrawn from a queue, when none of its pods may run any more:
    it acts as its workers' restart in place."""
    known = ledger.created.get((owner_of(job), job["metadata"]["name"]))
    if known is not None:
        by = ledger.removed_by.get(known, "nobody")
        left = [_name(p) for p in ledger.api.all("pods") if owner_of(p) == known and may_run(p)]
        is_fresh = ledger.monotonic() - ledger.removed_at.get(known, 0.0) < REMEMBERED_SECONDS
        is_withdrawn = names.LABEL_KUEUE_QUEUE in job["metadata"]["labels"] and not left
        is_excused = is_withdrawn or (by not in {"nobody", *ledger.operators} and (is_fresh or not left))
        _hold(is_excused, f"{_name(job)} was made twice; the first, {known}, was removed by {by}; left: {left}")


def a_stage_waits_for_those_it_depends_on(ledger: Ledger, job: Object) -> None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    if run is not None:
        states = {s.name: s.state for s in _status(run).stages}
        name = job["metadata"]["labels"][names.LABEL_STAGE]
        missing = [d for d in _dependencies(run)[name] if states.get(d) != "Succeeded"]
        _hold(not missing, f"{_name(job)} was made before {', '.join(missing)} succeeded")


def an_ended_stage_gets_no_job(ledger: Ledger, job: Object) -> None:
    stage = _stage_of(ledger, job)
    _hold(stage is None or stage.state not in _FINISHED, f"{_name(job)} was made for a stage that is over")


def an_ended_run_gets_no_job(ledger: Ledger, job: Object) -> None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    is_over = run is not None and _status(run).is_finished and not _may_go_on(run, _status(run))
    _hold(not is_over, f"{_name(job)} was made for a run that is over")


JOB_LAWS: tuple[Callable[[Ledger, Object], None], ...] = (
    jobs_belong_to_a_living_run,
    a_later_attempt_is_in_the_status_before_its_job,
    no_job_is_made_twice,
    a_stage_waits_for_those_it_depends_on,
    an_ended_stage_gets_no_job,
    an_ended_run_gets_no_job,
)


# Laws of a status that an operator wrote.


def stages_are_kept_in_order(run: Object, old: Status, new: Status) -> None:
    before, after = [s.name for s in old.stages], [s.name for s in new.stages]
    _hold(after[: len(before)] == before, f"stages were {before} and became {after}")
    wanted = [s["name"] for s in run["spec"]["stages"]]
    _hold(new.is_finished or after == wanted, f"the spec has the stages {wanted}, the status {after}")


def attempts_never_go_down(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        _hold(
            before.attempt <= after.attempt <= before.attempt + 1,
            f"{after.name}'s attempt was {before.attempt} and became {after.attempt}",
        )


def restarts_never_go_down(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        less = {c: (n, after.restarts.get(c, 0)) for c, n in before.restarts.items() if after.restarts.get(c, 0) < n}
        _hold(not less, f"{after.name}'s restarts went down: {less}")


def restarts_stay_in_their_budgets(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pairs(old, new):
        counted, known = _charged(after), _charged(before)
        for cause in (c for c, n in counted.items() if n > known.get(c, 0)):
            allowed = budget(cause, policy)
            _hold(
                allowed is None or counted[cause] <= allowed,
                f"{after.name} was restarted {counted[cause]} times for {cause}, of {allowed} allowed",
            )


def a_stage_fails_only_beyond_its_budget(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pairs(old, new):
        last = after.last_failure
        if after.state != "Failed" or before.state == "Failed" or last is None:
            continue
        allowed = budget(last.cause, policy)
        shared = ("Stalled", "Crash") if last.cause in ("Stalled", "Crash") else (last.cause,)
        used = sum(_charged(after).get(c, 0) for c in shared)
        _hold(
            allowed is not None and used >= allowed,
            f"{after.name} failed by {last.cause} after {used} restarts, of {allowed} allowed",
        )


def what_succeeded_stays(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        if before.state == "Succeeded":
            _hold(
                msgspec.structs.replace(after, gate=before.gate) == before,
                f"{after.name} had succeeded and was changed: {before} became {after}",
            )


def a_started_stage_keeps_its_digest(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        kept = before.digest in ("", after.digest) and before.start_time in ("", after.start_time)
        _hold(kept, f"{after.name}'s digest or start changed: {before} became {after}")


def an_ended_run_stays_ended(run: Object, old: Status, new: Status) -> None:
    may_change = not old.is_finished or _may_go_on(run, old)
    _hold(may_change or _without_notes(old) == _without_notes(new), f"the run had ended, and its status became {new}")


def conditions_are_well_formed(run: Object, old: Status, new: Status) -> None:
    types = [c.type for c in new.conditions]
    _hold(len(set(types)) == len(types), f"conditions are {types}")
    _hold({t.value for t in _ALWAYS} <= set(types), f"conditions are {types}")
    _hold(not (new.is_true(ConditionType.SUCCEEDED) and new.is_true(ConditionType.FAILED)), "Succeeded and Failed")
    _hold(not (new.is_finished and new.is_true(ConditionType.RUNNING)), "ended and Running")
    for condition in new.conditions:
        before = old.condition(ConditionType(condition.type))
        is_kept = before is not None and before.last_transition_time == condition.last_transition_time
        is_same = before is not None and before.status == condition.status
        _hold(is_kept or not is_same, f"{condition.type} is still {condition.status}, its transition time moved")
        _hold(bool(condition.reason), f"{condition.type} has no reason")


def the_status_is_of_this_generation(run: Object, old: Status, new: Status) -> None:
    generation = run["metadata"]["generation"]
    _hold(new.observed_generation == generation, f"it says generation {new.observed_generation}, not {generation}")


def every_second_is_counted_once(run: Object, old: Status, new: Status) -> None:
    """Between two settlements the buckets grow by the time between them; an ended run's clock stands."""
    if not new.goodput.settled_at:
        return
    before, after = sum(old.goodput.seconds.values()), sum(new.goodput.seconds.values())
    since = parse_time(old.goodput.settled_at or new.start_time)
    passed = parse_time(new.goodput.settled_at) - since
    _hold(passed >= 0, f"settled at {new.goodput.settled_at}, before at {old.goodput.settled_at}")
    expected = 0.0 if old.completion_time else passed
    _hold(after - before == expected, f"{passed} s passed and {after - before} s were entered: {new.goodput.seconds}")
    _hold(all(v >= 0 for v in new.goodput.seconds.values()), f"less than nothing: {new.goodput.seconds}")
    gpus = sum(old.goodput.gpu_seconds.values()), sum(new.goodput.gpu_seconds.values())
    _hold(gpus[0] <= gpus[1], f"GPU seconds shrank from {gpus[0]} to {gpus[1]}")


def times_are_set_once(run: Object, old: Status, new: Status) -> None:
    _hold(old.start_time in ("", new.start_time), f"started at {old.start_time}, then at {new.start_time}")
    is_refused = any(c.reason == Reason.INVALID_SPEC for c in new.conditions)
    _hold(
        is_refused or bool(new.completion_time) == new.is_finished, f"ended: {new.is_finished}, {new.completion_time!r}"
    )


_ALWAYS = (
    ConditionType.SUCCEEDED,
    ConditionType.FAILED,
    ConditionType.RUNNING,
    ConditionType.SUSPENDED,
    ConditionType.STUCK,
)
STATUS_LAWS: tuple[Callable[[Object, Status, Status], None], ...] = (
    stages_are_kept_in_order,
    attempts_never_go_down,
    restarts_never_go_down,
    restarts_stay_in_their_budgets,
    a_stage_fails_only_beyond_its_budget,
    what_succeeded_stays,
    a_started_stage_keeps_its_digest,
    an_ended_run_stays_ended,
    conditions_are_well_formed,
    the_status_is_of_this_generation,
    every_second_is_counted_once,
    times_are_set_once,
)


# Laws of the world, between the steps.


def one_attempt_of_a_stage_lives(ledger: Ledger) -> None:
    """Two may for a moment, while an operator sees to it."""
    now, alive = ledger.monotonic(), _living_attempts(ledger.api)
    doubled = {key: jobs for key, jobs in alive.items() if len(jobs) > 1}
    ledger.doubled_since = {key: ledger.doubled_since.get(key, now) for key in doubled}
    for key, since in ledger.doubled_since.items():
        _hold(now - since <= TRANSITION_SECONDS, f"{now - since:.0f} s: both alive: {', '.join(doubled[key])}")


def a_suspended_run_has_no_running_pods(ledger: Ledger) -> None:
    """Once all is quiet."""
    for run in ledger.api.all("sailvlruns"):
        if run["spec"].get("suspend") and not _status(run).is_finished:
            _hold(_status(run).is_true(ConditionType.SUSPENDED), "spec.suspend is true, the run is not Suspended")
            left = [_name(p) for p in ledger.api.all("pods") if _is_of(run, p) and may_run(p)]
            _hold(not left, f"the run is suspended, and these may run: {', '.join(left)}")


def an_ended_run_has_no_running_pods(ledger: Ledger) -> None:
    """Once all is quiet."""
    for run in ledger.api.all("sailvlruns"):
        if _status(run).is_finished:
            left = [_name(p) for p in ledger.api.all("pods") if _is_of(run, p) and may_run(p)]
            _hold(not left, f"the run has ended, and these may run: {', '.join(left)}")


def only_current_attempts_are_left(ledger: Ledger) -> None:
    """Once all is quiet: no Job of a removed run, nor of an older attempt."""
    for job in ledger.api.all("jobs"):
        stage = _stage_of(ledger, job)
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        _hold(stage is not None, f"{_name(job)} is of no living run")
        _hold(stage is None or stage.attempt == number, f"{_name(job)} is left of an older attempt")


def every_status_was_seen(ledger: Ledger) -> None:
    """Once all is quiet: the status is of the newest spec."""
    for run in ledger.api.all("sailvlruns"):
        if not _status(run).is_finished:
            the_status_is_of_this_generation(run, _status(run), _status(run))


WORLD_LAWS: tuple[Callable[[Ledger], None], ...] = (one_attempt_of_a_stage_lives,)
QUIET_LAWS: tuple[Callable[[Ledger], None], ...] = (
    a_suspended_run_has_no_running_pods,
    an_ended_run_has_no_running_pods,
    only_current_attempts_are_left,
    every_status_was_seen,
)


def _living_attempts(api: ModelApi) -> Mapping[tuple[str, str], list[str]]:
    """Jobs with pods that may run, by run and stage."""
    busy = {owner_of(p) for p in api.all("pods") if may_run(p) and "deletionTimestamp" not in p["metadata"]}
    found: dict[tuple[str, str], list[str]] = {}
    for job in api.all("jobs"):
        if job["metadata"]["uid"] in busy and "deletionTimestamp" not in job["metadata"]:
            found.setdefault((owner_of(job), job["metadata"]["labels"][names.LABEL_STAGE]), []).append(_name(job))
    return found


def _status(run: Object | None) -> Status:
    assert run is not None
    return msgspec.convert(run.get("status") or {}, Status)


def _stage_of(ledger: Ledger, job: Object) -> StageStatus | None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    if run is None:
        return None
    return next((s for s in _status(run).stages if s.name == job["metadata"]["labels"][names.LABEL_STAGE]), None)


def _pairs(old: Status, new: Status) -> list[tuple[StageStatus, StageStatus]]:
    before = {s.name: s for s in old.stages}
    return [(before.get(s.name) or StageStatus(name=s.name, state="Pending"), s) for s in new.stages]


def _charged(stage: StageStatus) -> Mapping[str, int]:
    """What counts against the budgets."""
    return stage.charged


def _dependencies(run: Object) -> dict[str, tuple[str, ...]]:
    from sailvl_operator.api.parse import parse_run

    return {p.stage.name: p.depends_on for p in plan(parse_run(run))}


def _may_go_on(run: Object, old: Status) -> bool:
    """Stages were appended, a spec was changed that the run failed by, or a person asks for a stage."""
    failed = old.condition(ConditionType.FAILED)
    has_failed = failed is not None and failed.status == "True"
    is_edited = run["metadata"]["generation"] != old.observed_generation
    is_mended = failed is not None and has_failed and failed.reason in _MENDED_BY_SPEC and is_edited
    is_extended = not has_failed and len(run["spec"]["stages"]) > len(old.stages)
    is_asked = names.ANNOTATION_RESTART in run["metadata"].get("annotations", {}) or bool(old.restart_handled)
    return is_mended or is_extended or is_asked


def _without_notes(status: Status) -> Status:
    """A status but for the generation and the request that it notes."""
    conditions = [msgspec.structs.replace(c, observed_generation=0) for c in status.conditions]
    return msgspec.structs.replace(status, observed_generation=0, restart_handled="", conditions=conditions)


def _is_of(run: Object, pod: Object) -> bool:
    return bool(pod["metadata"]["labels"][names.LABEL_RUN] == run["metadata"]["name"])


def _name(body: Object) -> str:
    return f"{body['metadata']['name']} ({body['metadata']['uid']})"


def _hold(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenLawError(otherwise)
