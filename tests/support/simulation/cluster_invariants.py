"""Invariants of the whole simulated cluster, checked between two steps of the random walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType, Reason
from sailvl_operator.core.stage_view import ACTIVE
from tests.support.apiserver.objects import Object, get_owner_uid, is_active
from tests.support.apiserver.store import ObjectStore
from tests.support.simulation.invariants import InvariantChecker, describe, find_stage
from tests.support.simulation.status_invariants import (
    decode_run_status,
    require,
    status_describes_current_generation,
)

TRANSITION_SECONDS = 60.0
"""Time for which two attempts of a stage may both have active pods."""


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
            left = [describe(p) for p in checker.api.list_objects("pods") if _belongs_to(run, p) and is_active(p)]
            require(not left, f"the run is suspended with active pods: {', '.join(left)}")


def finished_run_has_no_active_pods(checker: InvariantChecker) -> None:
    for run in checker.api.list_objects("sailvlruns"):
        if decode_run_status(run).is_finished:
            left = [describe(p) for p in checker.api.list_objects("pods") if _belongs_to(run, p) and is_active(p)]
            require(not left, f"the run has finished with active pods: {', '.join(left)}")


def only_current_attempts_remain(checker: InvariantChecker) -> None:
    """Allow neither Jobs of removed runs nor Jobs of earlier attempts."""
    for job in checker.api.list_objects("jobs"):
        stage = find_stage(checker, job)
        number = int(job["metadata"]["labels"][names.LABEL_ATTEMPT])
        require(stage is not None, f"{describe(job)} belongs to no existing run")
        require(stage is None or stage.attempt == number, f"{describe(job)} belongs to an earlier attempt")


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
        require(not (disabled and policies), f"{describe(run)} disables its NetworkPolicy, and has one")
        require(disabled or not active or bool(policies), f"{describe(run)} is active without a NetworkPolicy")


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


def _list_active_attempts(api: ObjectStore) -> Mapping[tuple[str, str], list[str]]:
    """Return the Jobs with active pods by run and stage."""
    busy = {
        get_owner_uid(p) for p in api.list_objects("pods") if is_active(p) and "deletionTimestamp" not in p["metadata"]
    }
    found: dict[tuple[str, str], list[str]] = {}
    for job in api.list_objects("jobs"):
        if job["metadata"]["uid"] in busy and "deletionTimestamp" not in job["metadata"]:
            found.setdefault((get_owner_uid(job), job["metadata"]["labels"][names.LABEL_STAGE]), []).append(
                describe(job)
            )
    return found


def _belongs_to(run: Object, pod: Object) -> bool:
    return bool(pod["metadata"]["labels"][names.LABEL_RUN] == run["metadata"]["name"])
