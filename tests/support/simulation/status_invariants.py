"""Invariants of a status that replaces another one; `invariants.py` checks them at every write of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_spec
from sailvl_operator.api.status import ConditionType, Reason, StageStatus, Status
from sailvl_operator.core.restart_policy import find_budget
from sailvl_operator.core.units import parse_time
from tests.support.apiserver.objects import Object

_FIXED_BY_SPEC_EDIT = (Reason.INVALID_SPEC, Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED)


class InvariantViolation(AssertionError):  # noqa: N818  # it is a finding, not a mistake of the caller
    """An invariant does not require; the message shows the values."""


def stages_keep_their_order(run: Object, old: Status, new: Status) -> None:
    before, after = [s.name for s in old.stages], [s.name for s in new.stages]
    require(after[: len(before)] == before, f"stages were {before} and became {after}")
    wanted = [s["name"] for s in run["spec"]["stages"]]
    require(new.is_finished or after == wanted, f"the spec has the stages {wanted}, the status {after}")


def attempts_never_decrease(run: Object, old: Status, new: Status) -> None:
    for before, after in _pair_stages(old, new):
        require(
            before.attempt <= after.attempt <= before.attempt + 1,
            f"{after.name}'s attempt was {before.attempt} and became {after.attempt}",
        )


def state_transitions_are_valid(run: Object, old: Status, new: Status) -> None:
    for before, after in _pair_stages(old, new):
        require(after.state in _NEXT_STATES[before.state], f"{after.name} was {before.state} and became {after.state}")
        is_new = after.attempt > before.attempt and not new.is_finished  # a finished run starts no attempt
        first_states = _FIRST_STATES | ({"Running"} if after.attempt == 1 else set())
        require(
            not is_new or after.state in first_states, f"{after.name}'s attempt {after.attempt} starts as {after.state}"
        )


def restarts_never_decrease(run: Object, old: Status, new: Status) -> None:
    for before, after in _pair_stages(old, new):
        less = {c: (n, after.restarts.get(c, 0)) for c, n in before.restarts.items() if after.restarts.get(c, 0) < n}
        require(not less, f"{after.name}'s restarts went down: {less}")


def restarts_stay_within_budget(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pair_stages(old, new):
        counted, known = _get_counted_restarts(after), _get_counted_restarts(before)
        for cause in (c for c, n in counted.items() if n > known.get(c, 0)):
            allowed = find_budget(cause, policy)
            used = sum(counted.get(c, 0) for c in _list_budget_causes(cause))
            require(
                allowed is None or used <= allowed,
                f"{after.name} was restarted {used} times for {cause}; allowed are {allowed}",
            )


def stage_fails_only_after_its_budget(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pair_stages(old, new):
        last = after.last_failure
        if after.state != "Failed" or before.state == "Failed" or last is None:
            continue
        allowed = find_budget(last.cause, policy)
        used = sum(_get_counted_restarts(after).get(c, 0) for c in _list_budget_causes(last.cause))
        require(
            allowed is not None and used >= allowed,
            f"{after.name} failed with {last.cause} after {used} restarts; allowed are {allowed}",
        )


def succeeded_stage_stays_unchanged(run: Object, old: Status, new: Status) -> None:
    for before, after in _pair_stages(old, new):
        if before.state == "Succeeded":
            require(
                msgspec.structs.replace(after, gate_result=before.gate_result) == before,
                f"{after.name} had succeeded and changed: {before} became {after}",
            )


def started_stage_keeps_its_digest(run: Object, old: Status, new: Status) -> None:
    for before, after in _pair_stages(old, new):
        is_unchanged = before.digest in ("", after.digest) and before.start_time in ("", after.start_time)
        require(is_unchanged, f"{after.name}'s digest or start changed: {before} became {after}")


def finished_run_stays_finished(run: Object, old: Status, new: Status) -> None:
    may_change = not old.is_finished or may_resume(run, old)
    require(
        may_change or _without_observations(old) == _without_observations(new),
        f"the run had finished, and its status became {new}",
    )


def conditions_are_well_formed(run: Object, old: Status, new: Status) -> None:
    types = [c.type for c in new.conditions]
    require(len(set(types)) == len(types), f"conditions are {types}")
    require({t.value for t in _REQUIRED_CONDITIONS} <= set(types), f"conditions are {types}")
    require(not (new.is_true(ConditionType.SUCCEEDED) and new.is_true(ConditionType.FAILED)), "Succeeded and Failed")
    require(not (new.is_finished and new.is_true(ConditionType.RUNNING)), "finished and Running")
    for condition in new.conditions:
        before = old.condition(ConditionType(condition.type))
        is_kept = before is not None and before.last_transition_time == condition.last_transition_time
        is_same = before is not None and before.status == condition.status
        require(
            is_kept or not is_same, f"{condition.type} is still {condition.status}, but its transition time changed"
        )
        require(bool(condition.reason), f"{condition.type} has no reason")


def status_describes_current_generation(run: Object, old: Status, new: Status) -> None:
    generation = run["metadata"]["generation"]
    require(new.observed_generation == generation, f"observedGeneration is {new.observed_generation}, not {generation}")


def every_second_is_counted_once(run: Object, old: Status, new: Status) -> None:
    """Require that the goodput buckets grow by exactly the time between two updates; a finished run's do not grow."""
    if not new.goodput.settled_at:
        return
    before, after = sum(old.goodput.seconds.values()), sum(new.goodput.seconds.values())
    since = parse_time(old.goodput.settled_at or new.start_time)
    passed = parse_time(new.goodput.settled_at) - since
    require(passed >= 0, f"accounted until {new.goodput.settled_at}, before until {old.goodput.settled_at}")
    expected = 0.0 if old.completion_time else passed
    require(after - before == expected, f"{passed} s passed, {after - before} s were counted: {new.goodput.seconds}")
    require(all(v >= 0 for v in new.goodput.seconds.values()), f"negative seconds: {new.goodput.seconds}")
    gpus = sum(old.goodput.gpu_seconds.values()), sum(new.goodput.gpu_seconds.values())
    require(gpus[0] <= gpus[1], f"GPU seconds shrank from {gpus[0]} to {gpus[1]}")


def times_are_set_once(run: Object, old: Status, new: Status) -> None:
    require(old.start_time in ("", new.start_time), f"started at {old.start_time}, then at {new.start_time}")
    is_refused = any(c.reason == Reason.INVALID_SPEC for c in new.conditions)
    require(
        is_refused or bool(new.completion_time) == new.is_finished,
        f"finished: {new.is_finished}, completion time {new.completion_time!r}",
    )


_LATER_STATES = {"Restarting", "Suspended", "Succeeded", "Failed"}
_NEXT_STATES = {
    "Pending": {"Pending", "Starting", "Running"},  # workers can run before a status showed their start
    "Starting": {"Starting", "Running", *_LATER_STATES},
    "Running": {"Running", *_LATER_STATES},
    "Restarting": {"Running", *_LATER_STATES},
    "Suspended": {"Suspended", "Restarting", "Succeeded"},
    "Succeeded": {"Succeeded"},
    "Failed": {"Failed", "Restarting"},
}
"""States that may follow a state in one write."""
_FIRST_STATES = {"Starting", "Restarting"}
_REQUIRED_CONDITIONS = (
    ConditionType.SUCCEEDED,
    ConditionType.FAILED,
    ConditionType.RUNNING,
    ConditionType.SUSPENDED,
    ConditionType.STUCK,
)
STATUS_INVARIANTS: tuple[Callable[[Object, Status, Status], None], ...] = (
    stages_keep_their_order,
    attempts_never_decrease,
    state_transitions_are_valid,
    restarts_never_decrease,
    restarts_stay_within_budget,
    stage_fails_only_after_its_budget,
    succeeded_stage_stays_unchanged,
    started_stage_keeps_its_digest,
    finished_run_stays_finished,
    conditions_are_well_formed,
    status_describes_current_generation,
    every_second_is_counted_once,
    times_are_set_once,
)


def decode_run_status(run: Object | None) -> Status:
    """Return the status of a run that exists."""
    assert run is not None
    return msgspec.convert(run.get("status") or {}, Status)


def may_resume(run: Object, old: Status) -> bool:
    """Return whether a finished run may run again: stages were appended, the cause of its failure was edited, or a
    user requested a restart.
    """
    failed = old.condition(ConditionType.FAILED)
    has_failed = failed is not None and failed.status == "True"
    is_edited = run["metadata"]["generation"] != old.observed_generation
    is_fixed = failed is not None and has_failed and failed.reason in _FIXED_BY_SPEC_EDIT and is_edited
    is_extended = not has_failed and len(run["spec"]["stages"]) > len(old.stages)
    is_requested = names.ANNOTATION_RESTART in run["metadata"].get("annotations", {}) or bool(
        old.observed_restart_request
    )
    return is_fixed or is_extended or is_requested


def require(holds: bool, message: str) -> None:
    """Raise InvariantViolation unless a condition holds."""
    if not holds:
        raise InvariantViolation(message)


def _without_observations(status: Status) -> Status:
    """Return a status without the generation and the restart request that it observed."""
    conditions = [msgspec.structs.replace(c, observed_generation=0) for c in status.conditions]
    return msgspec.structs.replace(status, observed_generation=0, observed_restart_request="", conditions=conditions)


def _pair_stages(old: Status, new: Status) -> list[tuple[StageStatus, StageStatus]]:
    before = {s.name: s for s in old.stages}
    return [(before.get(s.name) or StageStatus(name=s.name, state="Pending"), s) for s in new.stages]


def _list_budget_causes(cause: str) -> tuple[str, ...]:
    """Return the causes that share a restart budget with a cause."""
    return ("Stalled", "Crash") if cause in ("Stalled", "Crash") else (cause,)


def _get_counted_restarts(stage: StageStatus) -> Mapping[str, int]:
    """Return the restarts that count against the budgets, by cause."""
    return stage.counted_restarts
