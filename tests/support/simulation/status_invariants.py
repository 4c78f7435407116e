"""What must hold of every status that an operator writes over another; part of `run_laws.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_spec
from sailvl_operator.api.status import ConditionType, Reason, StageStatus, Status
from sailvl_operator.core.restart import budget
from sailvl_operator.core.units import parse_time
from tests.support.simulation.api import Object

_MENDED_BY_SPEC = (Reason.INVALID_SPEC, Reason.DEADLINE_EXCEEDED, Reason.GATE_FAILED)


class BrokenLawError(AssertionError):
    """Says which."""


def stages_are_kept_in_order(run: Object, old: Status, new: Status) -> None:
    before, after = [s.name for s in old.stages], [s.name for s in new.stages]
    hold(after[: len(before)] == before, f"stages were {before} and became {after}")
    wanted = [s["name"] for s in run["spec"]["stages"]]
    hold(new.is_finished or after == wanted, f"the spec has the stages {wanted}, the status {after}")


def attempts_never_go_down(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        hold(
            before.attempt <= after.attempt <= before.attempt + 1,
            f"{after.name}'s attempt was {before.attempt} and became {after.attempt}",
        )


def states_follow_each_other(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        hold(after.state in _NEXT[before.state], f"{after.name} was {before.state} and became {after.state}")
        is_new = after.attempt > before.attempt and not new.is_finished  # then all stops
        begins = _BEGIN | ({"Running"} if after.attempt == 1 else set())
        hold(not is_new or after.state in begins, f"{after.name}'s attempt {after.attempt} begins as {after.state}")


def restarts_never_go_down(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        less = {c: (n, after.restarts.get(c, 0)) for c, n in before.restarts.items() if after.restarts.get(c, 0) < n}
        hold(not less, f"{after.name}'s restarts went down: {less}")


def restarts_stay_in_their_budgets(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pairs(old, new):
        counted, known = _counted_restarts(after), _counted_restarts(before)
        for cause in (c for c, n in counted.items() if n > known.get(c, 0)):
            allowed = budget(cause, policy)
            used = sum(counted.get(c, 0) for c in _sharing(cause))
            hold(
                allowed is None or used <= allowed,
                f"{after.name} was restarted {used} times for {cause}, of {allowed} allowed",
            )


def a_stage_fails_only_beyond_its_budget(run: Object, old: Status, new: Status) -> None:
    policy = parse_spec(run["spec"]).restart_policy
    for before, after in _pairs(old, new):
        last = after.last_failure
        if after.state != "Failed" or before.state == "Failed" or last is None:
            continue
        allowed = budget(last.cause, policy)
        used = sum(_counted_restarts(after).get(c, 0) for c in _sharing(last.cause))
        hold(
            allowed is not None and used >= allowed,
            f"{after.name} failed by {last.cause} after {used} restarts, of {allowed} allowed",
        )


def what_succeeded_stays(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        if before.state == "Succeeded":
            hold(
                msgspec.structs.replace(after, gate=before.gate) == before,
                f"{after.name} had succeeded and was changed: {before} became {after}",
            )


def a_started_stage_keeps_its_digest(run: Object, old: Status, new: Status) -> None:
    for before, after in _pairs(old, new):
        kept = before.digest in ("", after.digest) and before.start_time in ("", after.start_time)
        hold(kept, f"{after.name}'s digest or start changed: {before} became {after}")


def an_ended_run_stays_ended(run: Object, old: Status, new: Status) -> None:
    may_change = not old.is_finished or may_go_on(run, old)
    hold(may_change or _without_notes(old) == _without_notes(new), f"the run had ended, and its status became {new}")


def conditions_are_well_formed(run: Object, old: Status, new: Status) -> None:
    types = [c.type for c in new.conditions]
    hold(len(set(types)) == len(types), f"conditions are {types}")
    hold({t.value for t in _ALWAYS} <= set(types), f"conditions are {types}")
    hold(not (new.is_true(ConditionType.SUCCEEDED) and new.is_true(ConditionType.FAILED)), "Succeeded and Failed")
    hold(not (new.is_finished and new.is_true(ConditionType.RUNNING)), "ended and Running")
    for condition in new.conditions:
        before = old.condition(ConditionType(condition.type))
        is_kept = before is not None and before.last_transition_time == condition.last_transition_time
        is_same = before is not None and before.status == condition.status
        hold(is_kept or not is_same, f"{condition.type} is still {condition.status}, its transition time moved")
        hold(bool(condition.reason), f"{condition.type} has no reason")


def the_status_is_of_this_generation(run: Object, old: Status, new: Status) -> None:
    generation = run["metadata"]["generation"]
    hold(new.observed_generation == generation, f"it says generation {new.observed_generation}, not {generation}")


def every_second_is_counted_once(run: Object, old: Status, new: Status) -> None:
    """Between two settlements the buckets grow by the time between them; an ended run's clock stands."""
    if not new.goodput.settled_at:
        return
    before, after = sum(old.goodput.seconds.values()), sum(new.goodput.seconds.values())
    since = parse_time(old.goodput.settled_at or new.start_time)
    passed = parse_time(new.goodput.settled_at) - since
    hold(passed >= 0, f"settled at {new.goodput.settled_at}, before at {old.goodput.settled_at}")
    expected = 0.0 if old.completion_time else passed
    hold(after - before == expected, f"{passed} s passed and {after - before} s were entered: {new.goodput.seconds}")
    hold(all(v >= 0 for v in new.goodput.seconds.values()), f"less than nothing: {new.goodput.seconds}")
    gpus = sum(old.goodput.gpu_seconds.values()), sum(new.goodput.gpu_seconds.values())
    hold(gpus[0] <= gpus[1], f"GPU seconds shrank from {gpus[0]} to {gpus[1]}")


def times_are_set_once(run: Object, old: Status, new: Status) -> None:
    hold(old.start_time in ("", new.start_time), f"started at {old.start_time}, then at {new.start_time}")
    is_refused = any(c.reason == Reason.INVALID_SPEC for c in new.conditions)
    hold(
        is_refused or bool(new.completion_time) == new.is_finished, f"ended: {new.is_finished}, {new.completion_time!r}"
    )


_ENDS = {"Restarting", "Suspended", "Succeeded", "Failed"}
_NEXT = {
    "Pending": {"Pending", "Starting", "Running"},  # its workers run before a status told of their start
    "Starting": {"Starting", "Running", *_ENDS},
    "Running": {"Running", *_ENDS},
    "Restarting": {"Running", *_ENDS},
    "Suspended": {"Suspended", "Restarting", "Succeeded"},
    "Succeeded": {"Succeeded"},
    "Failed": {"Failed", "Restarting"},
}
"""What a stage may become by one write."""
_BEGIN = {"Starting", "Restarting"}
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
    states_follow_each_other,
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


def status_of(run: Object | None) -> Status:
    assert run is not None
    return msgspec.convert(run.get("status") or {}, Status)


def may_go_on(run: Object, old: Status) -> bool:
    """Stages were appended, a spec was changed that the run failed by, or a person asks for a stage."""
    failed = old.condition(ConditionType.FAILED)
    has_failed = failed is not None and failed.status == "True"
    is_edited = run["metadata"]["generation"] != old.observed_generation
    is_mended = failed is not None and has_failed and failed.reason in _MENDED_BY_SPEC and is_edited
    is_extended = not has_failed and len(run["spec"]["stages"]) > len(old.stages)
    is_asked = names.ANNOTATION_RESTART in run["metadata"].get("annotations", {}) or bool(old.observed_restart_request)
    return is_mended or is_extended or is_asked


def hold(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenLawError(otherwise)


def _without_notes(status: Status) -> Status:
    """A status but for the generation and the request that it notes."""
    conditions = [msgspec.structs.replace(c, observed_generation=0) for c in status.conditions]
    return msgspec.structs.replace(status, observed_generation=0, observed_restart_request="", conditions=conditions)


def _pairs(old: Status, new: Status) -> list[tuple[StageStatus, StageStatus]]:
    before = {s.name: s for s in old.stages}
    return [(before.get(s.name) or StageStatus(name=s.name, state="Pending"), s) for s in new.stages]


def _sharing(cause: str) -> tuple[str, ...]:
    """Causes that share a budget with it."""
    return ("Stalled", "Crash") if cause in ("Stalled", "Crash") else (cause,)


def _counted_restarts(stage: StageStatus) -> Mapping[str, int]:
    """What counts against the budgets."""
    return stage.counted_restarts
