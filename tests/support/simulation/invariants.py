"""Invariants of new Jobs, checked in the random walk when an operator creates one, and the checker of all writes.

`cluster_invariants.py` has those of the whole cluster, `status_invariants.py` those of a status. The name of an
invariant is its statement; the walk adds seed, step and history to the message of a violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.status import IN_PLACE, StageStatus
from sailvl_operator.cluster.client import ClientConfig
from sailvl_operator.core.plan import plan
from tests.support.apiserver.objects import Object, get_owner_uid, is_active
from tests.support.apiserver.store import ObjectStore, ObjectWrite
from tests.support.simulation.status_invariants import (
    STATUS_INVARIANTS,
    InvariantViolation,
    decode_run_status,
    may_resume,
    require,
)

ORPHAN_SECONDS = 60.0
"""Time for which the pods of a removed Job may remain."""
STALE_WATCH_SECONDS = 400.0
"""Time for which the operator may not know an edit, until a hanging watch has timed out and has been audited."""
MAX_JOBS_OF_REMOVED_RUN = ClientConfig().max_tries
"""Jobs that may be created for a run whose removal the operator has not seen: one for each try of a POST."""
MAX_RESTARTS_PER_MINUTE = 6
"""Jobs of one stage that may follow failures within a minute, whatever its workers report."""
_FINISHED = ("Succeeded", "Failed")


@dataclass(kw_only=True)
class InvariantChecker:
    """Checks every write and remembers what later checks need."""

    api: ObjectStore
    monotonic: Callable[[], float]
    created: dict[tuple[str, str], str] = field(default_factory=dict)
    """uid of the Job that was created last, by the run's uid and the Job's name."""
    restarts: dict[tuple[str, str], tuple[int, tuple[float, ...]]] = field(default_factory=dict)
    """Number of restarts when a stage's last Job was created, and the times of the Jobs that followed failures within
    the last minute, by the run's uid and the stage."""
    jobs_after_removal: Counter[str] = field(default_factory=Counter)
    """Number of Jobs created after the removal of their run, by the run's uid."""
    edited_at: dict[str, float] = field(default_factory=dict)
    """Time of the last change of `suspend` or of a gate, by the run's uid."""
    removed_by: dict[str, str] = field(default_factory=dict)
    """The client that removed an object, by its uid."""
    removed_at: dict[str, float] = field(default_factory=dict)
    """Monotonic time at which an object was removed, by its uid."""
    operators: set[str] = field(default_factory=set)
    overlapping_since: dict[tuple[str, str], float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    """Violated invariants; collected, because an exception would reach the client that writes."""

    def observe(self, write: ObjectWrite) -> None:
        """Check a write against the state before it, then remember it."""
        if write.plural == "jobs" and write.verb == "create" and write.by in self.operators:
            for invariant in JOB_INVARIANTS:
                self.check(invariant, self, write.object)
            self.created[get_owner_uid(write.object), write.object["metadata"]["name"]] = write.object["metadata"][
                "uid"
            ]
        if write.plural == "sailvlruns" and _get_holds(write.before) != _get_holds(write.after):
            self.edited_at[write.object["metadata"]["uid"]] = self.monotonic()
        if write.plural == "sailvlruns" and write.verb == "update" and write.by in self.operators:
            old, new = decode_run_status(write.before), decode_run_status(write.after)
            for status_invariant in STATUS_INVARIANTS if old != new else ():
                self.check(status_invariant, write.object, old, new)
        if write.verb == "remove":
            uid = write.object["metadata"]["uid"]
            self.removed_by[uid], self.removed_at[uid] = write.by, self.monotonic()

    def must_know_spec(self, run: Object) -> bool:
        """Return whether an operator must have seen the newest spec."""
        return self.monotonic() - self.edited_at[run["metadata"]["uid"]] > STALE_WATCH_SECONDS

    def check(self, invariant: Callable[..., None], *args: object) -> None:
        """Record a violation of an invariant by its arguments."""
        try:
            invariant(*args)
        except InvariantViolation as violation:
            self.violations.append(f"{invariant.__name__.replace('_', ' ')}: {violation}")


# Invariants of a new Job.


def jobs_belong_to_existing_runs(checker: InvariantChecker, job: Object) -> None:
    uid = get_owner_uid(job)
    if checker.api.find("sailvlruns", uid) is None:
        checker.jobs_after_removal[uid] += 1
        seconds = checker.monotonic() - checker.removed_at[uid]
        is_allowed = checker.jobs_after_removal[uid] <= MAX_JOBS_OF_REMOVED_RUN
        require(
            is_allowed,
            f"{describe(job)}: Job {checker.jobs_after_removal[uid]} for run {uid}, removed {seconds:.0f} s ago",
        )


def status_shows_attempt_before_job_exists(checker: InvariantChecker, job: Object) -> None:
    stage = find_stage(checker, job)
    if stage is not None:
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        require(
            number <= max(1, stage.attempt),
            f"{describe(job)} was created while the status shows attempt {stage.attempt}",
        )


def no_job_is_created_twice(checker: InvariantChecker, job: Object) -> None:
    """Allow a second Job only if another client removed the first, or if it was withdrawn from a queue without
    active pods: it then acts as a restart of the workers in place.
    """
    known = checker.created.get((get_owner_uid(job), job["metadata"]["name"]))
    if known is not None:
        by = checker.removed_by.get(known, "nobody")
        left = [describe(p) for p in checker.api.list_objects("pods") if get_owner_uid(p) == known and is_active(p)]
        is_recent = checker.monotonic() - checker.removed_at.get(known, 0.0) < ORPHAN_SECONDS
        is_withdrawn = names.LABEL_KUEUE_QUEUE in job["metadata"]["labels"] and not left
        is_allowed = is_withdrawn or (by not in {"nobody", *checker.operators} and (is_recent or not left))
        require(is_allowed, f"{describe(job)} was created twice; {known} was removed by {by}; active pods: {left}")


def stage_waits_for_dependencies(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    if run is not None:
        states = {s.name: s.state for s in decode_run_status(run).stages}
        name = job["metadata"]["labels"][names.LABEL_STAGE]
        missing = [d for d in _list_dependencies(run)[name] if states.get(d) != "Succeeded"]
        require(not missing, f"{describe(job)} was created before {', '.join(missing)} succeeded")


def stage_waits_at_gates(checker: InvariantChecker, job: Object) -> None:
    """Check the first attempt of a stage, unless a gate was changed so recently that the operator may not know."""
    run, labels = checker.api.find("sailvlruns", get_owner_uid(job)), job["metadata"]["labels"]
    if run is None or labels[names.LABEL_ATTEMPT] != "1" or not checker.must_know_spec(run):
        return
    metrics = {s.name: s.metrics for s in decode_run_status(run).stages}
    for stage in run["spec"]["stages"]:
        gate = stage.get("gate")
        if (
            gate
            and gate["onFail"] != "Continue"
            and stage["name"] in _list_dependencies(run)[labels[names.LABEL_STAGE]]
        ):
            value = float(metrics[stage["name"]].get(gate["metric"], "inf"))
            require(value <= float(gate["atMost"]), f"{describe(job)} was created behind the gate of {stage['name']}")


def suspended_run_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    is_suspended = run is not None and run["spec"].get("suspend", False) and checker.must_know_spec(run)
    require(not is_suspended, f"{describe(job)} was created for a suspended run")


def finished_stage_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    stage = find_stage(checker, job)
    require(stage is None or stage.state not in _FINISHED, f"{describe(job)} was created for a finished stage")


def finished_run_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    is_finished = run is not None and decode_run_status(run).is_finished and not may_resume(run, decode_run_status(run))
    require(not is_finished, f"{describe(job)} was created for a finished run")


def restarts_are_rare(checker: InvariantChecker, job: Object) -> None:
    """Allow only so many restarts a minute; a Job that follows no failure, but a user's request, starts a new count."""
    stage, now = find_stage(checker, job), checker.api.clock()
    if stage is None:
        return
    key, number = (get_owner_uid(job), stage.name), sum(n for c, n in stage.restarts.items() if c != IN_PLACE)
    known, times = checker.restarts.get(key, (0, ()))
    recent = (*(time for time in times if now - time < 60.0), now) if number > known else ()
    checker.restarts[key] = number, recent
    require(len(recent) <= MAX_RESTARTS_PER_MINUTE, f"{describe(job)} is restart {len(recent)} within a minute")


JOB_INVARIANTS: tuple[Callable[[InvariantChecker, Object], None], ...] = (
    jobs_belong_to_existing_runs,
    status_shows_attempt_before_job_exists,
    no_job_is_created_twice,
    stage_waits_for_dependencies,
    stage_waits_at_gates,
    suspended_run_gets_no_job,
    finished_stage_gets_no_job,
    finished_run_gets_no_job,
    restarts_are_rare,
)


def _get_holds(run: Object | None) -> object:
    """Return the fields of a spec that require stages back."""
    return None if run is None else (run["spec"].get("suspend"), [s.get("gate") for s in run["spec"]["stages"]])


def find_stage(checker: InvariantChecker, job: Object) -> StageStatus | None:
    """Return the status of the stage that a Job belongs to; None if its run is gone."""
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    if run is None:
        return None
    return next(
        (s for s in decode_run_status(run).stages if s.name == job["metadata"]["labels"][names.LABEL_STAGE]), None
    )


def _list_dependencies(run: Object) -> dict[str, tuple[str, ...]]:
    return {p.stage.name: p.depends_on for p in plan(parse_run(run))}


def describe(body: Object) -> str:
    """Return name and uid of an object."""
    return f"{body['metadata']['name']} ({body['metadata']['uid']})"
