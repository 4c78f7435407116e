"""Invariants of runs, Jobs and pods, checked in the random walk whatever happens.

Those of a single write are checked when it is created, those of the whole cluster between two steps. The name of an
invariant is its statement; the walk adds seed, step and history to the message of a violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.status import ConditionType, Reason, StageStatus
from sailvl_operator.cluster.client import ClientConfig
from sailvl_operator.core.plan import plan
from sailvl_operator.core.stage_view import ACTIVE
from tests.support.apiserver.objects import Object, get_owner_uid, is_active
from tests.support.apiserver.store import ObjectStore, ObjectWrite
from tests.support.simulation.status_invariants import (
    STATUS_INVARIANTS,
    InvariantViolation,
    decode_run_status,
    may_resume,
    require,
    status_describes_current_generation,
)

TRANSITION_SECONDS = 60.0
"""Time for which two attempts of a stage may both have active pods."""
ORPHAN_SECONDS = 60.0
"""Time for which the pods of a removed Job may remain."""
STALE_WATCH_SECONDS = 400.0
"""Time for which the operator may not know an edit, until a hanging watch has timed out and has been audited."""
MAX_JOBS_OF_REMOVED_RUN = ClientConfig().max_tries
"""Jobs that may be created for a run whose removal the operator has not seen: one for each try of a POST."""
_FINISHED = ("Succeeded", "Failed")


@dataclass(kw_only=True)
class InvariantChecker:
    """Checks every write and remembers what later checks need."""

    api: ObjectStore
    monotonic: Callable[[], float]
    created: dict[tuple[str, str], str] = field(default_factory=dict)
    """uid of the Job that was created last, by the run's uid and the Job's name."""
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
            f"{_describe(job)}: Job {checker.jobs_after_removal[uid]} for run {uid}, removed {seconds:.0f} s ago",
        )


def status_shows_attempt_before_job_exists(checker: InvariantChecker, job: Object) -> None:
    stage = _find_stage(checker, job)
    if stage is not None:
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        require(
            number <= max(1, stage.attempt),
            f"{_describe(job)} was created while the status shows attempt {stage.attempt}",
        )


def no_job_is_created_twice(checker: InvariantChecker, job: Object) -> None:
    """Allow a second Job only if another client removed the first, or if it was withdrawn from a queue without
    active pods: it then acts as a restart of the workers in place.
    """
    known = checker.created.get((get_owner_uid(job), job["metadata"]["name"]))
    if known is not None:
        by = checker.removed_by.get(known, "nobody")
        left = [_describe(p) for p in checker.api.list_objects("pods") if get_owner_uid(p) == known and is_active(p)]
        is_recent = checker.monotonic() - checker.removed_at.get(known, 0.0) < ORPHAN_SECONDS
        is_withdrawn = names.LABEL_KUEUE_QUEUE in job["metadata"]["labels"] and not left
        is_allowed = is_withdrawn or (by not in {"nobody", *checker.operators} and (is_recent or not left))
        require(is_allowed, f"{_describe(job)} was created twice; {known} was removed by {by}; active pods: {left}")


def stage_waits_for_dependencies(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    if run is not None:
        states = {s.name: s.state for s in decode_run_status(run).stages}
        name = job["metadata"]["labels"][names.LABEL_STAGE]
        missing = [d for d in _list_dependencies(run)[name] if states.get(d) != "Succeeded"]
        require(not missing, f"{_describe(job)} was created before {', '.join(missing)} succeeded")


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
            require(value <= float(gate["atMost"]), f"{_describe(job)} was created behind the gate of {stage['name']}")


def suspended_run_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    is_suspended = run is not None and run["spec"].get("suspend", False) and checker.must_know_spec(run)
    require(not is_suspended, f"{_describe(job)} was created for a suspended run")


def finished_stage_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    stage = _find_stage(checker, job)
    require(stage is None or stage.state not in _FINISHED, f"{_describe(job)} was created for a finished stage")


def finished_run_gets_no_job(checker: InvariantChecker, job: Object) -> None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    is_finished = run is not None and decode_run_status(run).is_finished and not may_resume(run, decode_run_status(run))
    require(not is_finished, f"{_describe(job)} was created for a finished run")


JOB_INVARIANTS: tuple[Callable[[InvariantChecker, Object], None], ...] = (
    jobs_belong_to_existing_runs,
    status_shows_attempt_before_job_exists,
    no_job_is_created_twice,
    stage_waits_for_dependencies,
    stage_waits_at_gates,
    suspended_run_gets_no_job,
    finished_stage_gets_no_job,
    finished_run_gets_no_job,
)


# Invariants of the cluster, between two steps.


def one_attempt_per_stage_is_active(checker: InvariantChecker) -> None:
    """Allow two attempts with active pods only for the time of a transition."""
    now, active = checker.monotonic(), _list_active_attempts(checker.api)
    overlapping = {key: jobs for key, jobs in active.items() if len(jobs) > 1}
    checker.overlapping_since = {key: checker.overlapping_since.get(key, now) for key in overlapping}
    for key, since in checker.overlapping_since.items():
        require(
            now - since <= TRANSITION_SECONDS, f"{now - since:.0f} s: active attempts: {', '.join(overlapping[key])}"
        )


def suspended_run_has_no_active_pods(checker: InvariantChecker) -> None:
    for run in checker.api.list_objects("sailvlruns"):
        if run["spec"].get("suspend") and not decode_run_status(run).is_finished:
            require(
                decode_run_status(run).is_true(ConditionType.SUSPENDED),
                "spec.suspend is true, but the run is not Suspended",
            )
            left = [_describe(p) for p in checker.api.list_objects("pods") if _belongs_to(run, p) and is_active(p)]
            require(not left, f"the run is suspended with active pods: {', '.join(left)}")


def finished_run_has_no_active_pods(checker: InvariantChecker) -> None:
    for run in checker.api.list_objects("sailvlruns"):
        if decode_run_status(run).is_finished:
            left = [_describe(p) for p in checker.api.list_objects("pods") if _belongs_to(run, p) and is_active(p)]
            require(not left, f"the run has finished with active pods: {', '.join(left)}")


def only_current_attempts_remain(checker: InvariantChecker) -> None:
    """Allow neither Jobs of removed runs nor Jobs of earlier attempts."""
    for job in checker.api.list_objects("jobs"):
        stage = _find_stage(checker, job)
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        require(stage is not None, f"{_describe(job)} belongs to no existing run")
        require(stage is None or stage.attempt == number, f"{_describe(job)} belongs to an earlier attempt")


def running_stage_has_all_workers(checker: InvariantChecker) -> None:
    for run in checker.api.list_objects("sailvlruns"):
        running = [s for s in decode_run_status(run).stages if s.state == "Running"]
        for stage in running if not decode_run_status(run).is_finished else []:
            job = checker.api.get(
                "jobs", run["metadata"]["namespace"], f"{run['metadata']['name']}-{stage.name}-{stage.attempt}"
            )
            require(job is not None, f"{stage.name} is Running without a Job")
            pods = [
                p
                for p in checker.api.list_objects("pods")
                if job is not None and get_owner_uid(p) == job["metadata"]["uid"]
            ]
            active = [p for p in pods if p["status"]["phase"] == "Running"]
            require(len(active) == len(pods) > 0, f"{stage.name} is Running with {len(active)} of {len(pods)} workers")


def unblocked_run_is_running(checker: InvariantChecker) -> None:
    """Require that a run is finished, suspended, waiting at a gate or running."""
    for run in checker.api.list_objects("sailvlruns"):
        status, stuck = decode_run_status(run), decode_run_status(run).condition(ConditionType.STUCK)
        waits = run["spec"].get("suspend") or (stuck is not None and stuck.reason == Reason.GATE_NOT_PASSED)
        is_well = status.is_finished or waits or status.is_true(ConditionType.RUNNING)
        require(bool(is_well), f"nothing blocks the run, but it is not running: {status}")


def every_spec_is_observed(checker: InvariantChecker) -> None:
    """Require that the status of every unfinished run describes its newest spec."""
    for run in checker.api.list_objects("sailvlruns"):
        if not decode_run_status(run).is_finished:
            status_describes_current_generation(run, decode_run_status(run), decode_run_status(run))


def active_run_is_protected(checker: InvariantChecker) -> None:
    """Require that a run with active workers has its NetworkPolicy, and no run whose spec disables it has one."""
    for run in checker.api.list_objects("sailvlruns"):
        uid, disabled = run["metadata"]["uid"], run["spec"].get("network", {}).get("policy") == "Disabled"
        policies = [p for p in checker.api.list_objects("networkpolicies") if get_owner_uid(p) == uid]
        if decode_run_status(run).is_finished:
            continue
        active = any(s.state in ACTIVE for s in decode_run_status(run).stages)
        require(not (disabled and policies), f"{_describe(run)} disables its NetworkPolicy, and has one")
        require(disabled or not active or bool(policies), f"{_describe(run)} is active without a NetworkPolicy")


CONTINUOUS_INVARIANTS: tuple[Callable[[InvariantChecker], None], ...] = (one_attempt_per_stage_is_active,)
QUIESCENT_INVARIANTS: tuple[Callable[[InvariantChecker], None], ...] = (
    suspended_run_has_no_active_pods,
    finished_run_has_no_active_pods,
    only_current_attempts_remain,
    running_stage_has_all_workers,
    unblocked_run_is_running,
    every_spec_is_observed,
    active_run_is_protected,
)


def _get_holds(run: Object | None) -> object:
    """Return the fields of a spec that require stages back."""
    return None if run is None else (run["spec"].get("suspend"), [s.get("gate") for s in run["spec"]["stages"]])


def _list_active_attempts(api: ObjectStore) -> Mapping[tuple[str, str], list[str]]:
    """Return the Jobs with active pods by run and stage."""
    busy = {
        get_owner_uid(p) for p in api.list_objects("pods") if is_active(p) and "deletionTimestamp" not in p["metadata"]
    }
    found: dict[tuple[str, str], list[str]] = {}
    for job in api.list_objects("jobs"):
        if job["metadata"]["uid"] in busy and "deletionTimestamp" not in job["metadata"]:
            found.setdefault((get_owner_uid(job), job["metadata"]["labels"][names.LABEL_STAGE]), []).append(
                _describe(job)
            )
    return found


def _find_stage(checker: InvariantChecker, job: Object) -> StageStatus | None:
    run = checker.api.find("sailvlruns", get_owner_uid(job))
    if run is None:
        return None
    return next(
        (s for s in decode_run_status(run).stages if s.name == job["metadata"]["labels"][names.LABEL_STAGE]), None
    )


def _list_dependencies(run: Object) -> dict[str, tuple[str, ...]]:
    return {p.stage.name: p.depends_on for p in plan(parse_run(run))}


def _belongs_to(run: Object, pod: Object) -> bool:
    return bool(pod["metadata"]["labels"][names.LABEL_RUN] == run["metadata"]["name"])


def _describe(body: Object) -> str:
    return f"{body['metadata']['name']} ({body['metadata']['uid']})"
