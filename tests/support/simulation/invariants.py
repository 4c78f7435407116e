"""What must hold of a run whatever happens to it.

Laws of single writes are checked as each is made, laws of the world between the steps of the random walk, which adds
seed, step and history to the words of a broken law.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.status import ConditionType, Reason, StageStatus
from sailvl_operator.core.plan import plan
from sailvl_operator.settings import ApiSettings
from tests.support.simulation.api import ModelApi, Object, Write, may_run, owner_of
from tests.support.simulation.status_invariants import (
    STATUS_LAWS,
    BrokenLawError,
    hold,
    may_go_on,
    status_of,
    the_status_is_of_this_generation,
)

TRANSITION_SECONDS = 60.0
"""How long two attempts of a stage may both be alive while an operator serves the run."""
REMEMBERED_SECONDS = 60.0
"""How long the pods of a removed Job may be left."""
DEAF_SECONDS = 400.0
"""How long an edit may go unheard: a watch that hangs is given up, and what it missed is looked for now and then."""
JOBS_OF_THE_DEAD = ApiSettings().tries
"""Jobs that may be made for a run that was removed before its operator knew: each try of a POST, its answers lost."""
_FINISHED = ("Succeeded", "Failed")


@dataclass(kw_only=True)
class Ledger:
    """What the laws remember of the walk so far."""

    api: ModelApi
    monotonic: Callable[[], float]
    created: dict[tuple[str, str], str] = field(default_factory=dict)
    """uid of the Job that was made for a run's uid under a name."""
    made_for: Counter[str] = field(default_factory=Counter)
    """How many Jobs were made for a run's uid after it was removed."""
    edited_at: dict[str, float] = field(default_factory=dict)
    """When a run was last suspended, resumed or given other gates, by its uid."""
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
        if write.plural == "jobs" and write.verb == "create" and write.by in self.operators:
            for law in JOB_LAWS:
                self.check(law, self, write.object)
            self.created[owner_of(write.object), write.object["metadata"]["name"]] = write.object["metadata"]["uid"]
        if write.plural == "sailvlruns" and _barriers(write.before) != _barriers(write.after):
            self.edited_at[write.object["metadata"]["uid"]] = self.monotonic()
        if write.plural == "sailvlruns" and write.verb == "update" and write.by in self.operators:
            old, new = status_of(write.before), status_of(write.after)
            for status_law in STATUS_LAWS if old != new else ():
                self.check(status_law, write.object, old, new)
        if write.verb == "remove":
            uid = write.object["metadata"]["uid"]
            self.removed_by[uid], self.removed_at[uid] = write.by, self.monotonic()

    def has_heard(self, run: Object) -> bool:
        """Whether an operator must know the newest spec."""
        return self.monotonic() - self.edited_at[run["metadata"]["uid"]] > DEAF_SECONDS

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
        ledger.made_for[uid] += 1
        late = ledger.monotonic() - ledger.removed_at[uid]
        few = ledger.made_for[uid] <= JOBS_OF_THE_DEAD
        hold(few, f"{_name(job)} is the {ledger.made_for[uid]}. made for run {uid}, removed {late:.0f} s ago")


def a_later_attempt_is_in_the_status_before_its_job(ledger: Ledger, job: Object) -> None:
    stage = _stage_of(ledger, job)
    if stage is not None:
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        hold(number <= max(1, stage.attempt), f"{_name(job)} was made while the status says attempt {stage.attempt}")


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
        hold(is_excused, f"{_name(job)} was made twice; the first, {known}, was removed by {by}; left: {left}")


def a_stage_waits_for_those_it_depends_on(ledger: Ledger, job: Object) -> None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    if run is not None:
        states = {s.name: s.state for s in status_of(run).stages}
        name = job["metadata"]["labels"][names.LABEL_STAGE]
        missing = [d for d in _dependencies(run)[name] if states.get(d) != "Succeeded"]
        hold(not missing, f"{_name(job)} was made before {', '.join(missing)} succeeded")


def a_stage_waits_at_gates(ledger: Ledger, job: Object) -> None:
    """For its first attempt; a gate that was changed just now may not have been seen."""
    run, labels = ledger.api.find("sailvlruns", owner_of(job)), job["metadata"]["labels"]
    if run is None or labels[names.LABEL_ATTEMPT] != "1" or not ledger.has_heard(run):
        return
    metrics = {s.name: s.metrics for s in status_of(run).stages}
    for stage in run["spec"]["stages"]:
        gate = stage.get("gate")
        if gate and gate["onFail"] != "Continue" and stage["name"] in _dependencies(run)[labels[names.LABEL_STAGE]]:
            value = float(metrics[stage["name"]].get(gate["metric"], "inf"))
            hold(value <= float(gate["atMost"]), f"{_name(job)} was made behind the gate of {stage['name']}")


def a_suspended_run_gets_no_job(ledger: Ledger, job: Object) -> None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    is_suspended = run is not None and run["spec"].get("suspend", False) and ledger.has_heard(run)
    hold(not is_suspended, f"{_name(job)} was made for a run that is suspended")


def an_ended_stage_gets_no_job(ledger: Ledger, job: Object) -> None:
    stage = _stage_of(ledger, job)
    hold(stage is None or stage.state not in _FINISHED, f"{_name(job)} was made for a stage that is over")


def an_ended_run_gets_no_job(ledger: Ledger, job: Object) -> None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    is_over = run is not None and status_of(run).is_finished and not may_go_on(run, status_of(run))
    hold(not is_over, f"{_name(job)} was made for a run that is over")


JOB_LAWS: tuple[Callable[[Ledger, Object], None], ...] = (
    jobs_belong_to_a_living_run,
    a_later_attempt_is_in_the_status_before_its_job,
    no_job_is_made_twice,
    a_stage_waits_for_those_it_depends_on,
    a_stage_waits_at_gates,
    a_suspended_run_gets_no_job,
    an_ended_stage_gets_no_job,
    an_ended_run_gets_no_job,
)


# Laws of the world, between the steps.


def one_attempt_of_a_stage_lives(ledger: Ledger) -> None:
    """Two may for a moment, while an operator sees to it."""
    now, alive = ledger.monotonic(), _living_attempts(ledger.api)
    doubled = {key: jobs for key, jobs in alive.items() if len(jobs) > 1}
    ledger.doubled_since = {key: ledger.doubled_since.get(key, now) for key in doubled}
    for key, since in ledger.doubled_since.items():
        hold(now - since <= TRANSITION_SECONDS, f"{now - since:.0f} s: both alive: {', '.join(doubled[key])}")


def a_suspended_run_has_no_running_pods(ledger: Ledger) -> None:
    """Once all is quiet."""
    for run in ledger.api.all("sailvlruns"):
        if run["spec"].get("suspend") and not status_of(run).is_finished:
            hold(status_of(run).is_true(ConditionType.SUSPENDED), "spec.suspend is true, the run is not Suspended")
            left = [_name(p) for p in ledger.api.all("pods") if _is_of(run, p) and may_run(p)]
            hold(not left, f"the run is suspended, and these may run: {', '.join(left)}")


def an_ended_run_has_no_running_pods(ledger: Ledger) -> None:
    """Once all is quiet."""
    for run in ledger.api.all("sailvlruns"):
        if status_of(run).is_finished:
            left = [_name(p) for p in ledger.api.all("pods") if _is_of(run, p) and may_run(p)]
            hold(not left, f"the run has ended, and these may run: {', '.join(left)}")


def only_current_attempts_are_left(ledger: Ledger) -> None:
    """Once all is quiet: no Job of a removed run, nor of an older attempt."""
    for job in ledger.api.all("jobs"):
        stage = _stage_of(ledger, job)
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        hold(stage is not None, f"{_name(job)} is of no living run")
        hold(stage is None or stage.attempt == number, f"{_name(job)} is left of an older attempt")


def a_running_stage_has_its_workers(ledger: Ledger) -> None:
    """Once all is quiet."""
    for run in ledger.api.all("sailvlruns"):
        running = [s for s in status_of(run).stages if s.state == "Running"]
        for stage in running if not status_of(run).is_finished else []:
            job = ledger.api.get(
                "jobs", run["metadata"]["namespace"], f"{run['metadata']['name']}-{stage.name}-{stage.attempt}"
            )
            hold(job is not None, f"{stage.name} is Running, and its Job isn't there")
            pods = [p for p in ledger.api.all("pods") if job is not None and owner_of(p) == job["metadata"]["uid"]]
            alive = [p for p in pods if p["status"]["phase"] == "Running"]
            hold(len(alive) == len(pods) > 0, f"{stage.name} is Running, with {len(alive)} of {len(pods)} workers")


def what_may_run_runs(ledger: Ledger) -> None:
    """Once all is quiet: a run has ended, is suspended, waits at a gate or runs."""
    for run in ledger.api.all("sailvlruns"):
        status, stuck = status_of(run), status_of(run).condition(ConditionType.STUCK)
        waits = run["spec"].get("suspend") or (stuck is not None and stuck.reason == Reason.GATE_NOT_PASSED)
        is_well = status.is_finished or waits or status.is_true(ConditionType.RUNNING)
        hold(bool(is_well), f"nothing holds the run back, and it doesn't run: {status}")


def every_status_was_seen(ledger: Ledger) -> None:
    """Once all is quiet: the status is of the newest spec."""
    for run in ledger.api.all("sailvlruns"):
        if not status_of(run).is_finished:
            the_status_is_of_this_generation(run, status_of(run), status_of(run))


WORLD_LAWS: tuple[Callable[[Ledger], None], ...] = (one_attempt_of_a_stage_lives,)
QUIET_LAWS: tuple[Callable[[Ledger], None], ...] = (
    a_suspended_run_has_no_running_pods,
    an_ended_run_has_no_running_pods,
    only_current_attempts_are_left,
    a_running_stage_has_its_workers,
    what_may_run_runs,
    every_status_was_seen,
)


def _barriers(run: Object | None) -> object:
    """What of a spec holds stages back."""
    return None if run is None else (run["spec"].get("suspend"), [s.get("gate") for s in run["spec"]["stages"]])


def _living_attempts(api: ModelApi) -> Mapping[tuple[str, str], list[str]]:
    """Jobs with pods that may run, by run and stage."""
    busy = {owner_of(p) for p in api.all("pods") if may_run(p) and "deletionTimestamp" not in p["metadata"]}
    found: dict[tuple[str, str], list[str]] = {}
    for job in api.all("jobs"):
        if job["metadata"]["uid"] in busy and "deletionTimestamp" not in job["metadata"]:
            found.setdefault((owner_of(job), job["metadata"]["labels"][names.LABEL_STAGE]), []).append(_name(job))
    return found


def _stage_of(ledger: Ledger, job: Object) -> StageStatus | None:
    run = ledger.api.find("sailvlruns", owner_of(job))
    if run is None:
        return None
    return next((s for s in status_of(run).stages if s.name == job["metadata"]["labels"][names.LABEL_STAGE]), None)


def _dependencies(run: Object) -> dict[str, tuple[str, ...]]:
    return {p.stage.name: p.depends_on for p in plan(parse_run(run))}


def _is_of(run: Object, pod: Object) -> bool:
    return bool(pod["metadata"]["labels"][names.LABEL_RUN] == run["metadata"]["name"])


def _name(body: Object) -> str:
    return f"{body['metadata']['name']} ({body['metadata']['uid']})"
