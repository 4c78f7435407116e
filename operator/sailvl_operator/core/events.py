"""Collect the events of one decision: about stages, restart requests, gates and the run itself."""

from __future__ import annotations

from typing import Literal

from sailvl_operator.api.status import IN_PLACE, ConditionType, Reason, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core.conditions import RunTransition
from sailvl_operator.core.decision import Event
from sailvl_operator.core.restart_request import explain_refusal, find_request

_FINAL_CONDITIONS: tuple[tuple[ConditionType, Literal["Normal", "Warning"]], ...] = (
    (ConditionType.SUCCEEDED, "Normal"),
    (ConditionType.FAILED, "Warning"),
)


def collect_events(run: Run, old: Status, new: Status, transition: RunTransition) -> tuple[Event, ...]:
    """Return the events in the order in which things happened."""
    events = [event for stage in transition.stages for event in stage.events]
    if request := find_request(run, old):
        events += explain_refusal(request, old, is_suspended=run.spec.suspend)
    events += _report_in_place_restarts(old, new)
    events += _report_gates(transition)
    events += _report_stuck(old, new)
    events += _report_end(old, new)
    return tuple(events)


def _report_in_place_restarts(old: Status, new: Status) -> list[Event]:
    known = {stage.name: stage.restarts.get(IN_PLACE, 0) for stage in old.stages}
    return [
        Event(
            reason=Reason.RESTARTED_IN_PLACE,
            type="Warning",
            message=f"Stage {stage.name} attempt {stage.attempt}: ranks failed and were restarted in place; "
            "see the worker logs",
        )
        for stage in new.stages
        if stage.restarts.get(IN_PLACE, 0) > known.get(stage.name, 0)
    ]


def _report_gates(transition: RunTransition) -> list[Event]:
    """Report the gates whose result is new."""
    known = {stage.view.status.name: stage.view.status.gate_result for stage in transition.stages}
    return [
        Event(
            reason=Reason.GATE_PASSED if result.is_passed else Reason.GATE_FAILED,
            message=f"Stage {result.stage}: {result.message}"[:1000],
            type="Normal" if result.is_passed else "Warning",
        )
        for result in transition.gate_results
        if known[result.stage] != result.to_status()
    ]


def _report_stuck(old: Status, new: Status) -> list[Event]:
    """Report a new reason of the Stuck condition; a new message of the same reason is no event."""
    before, after = old.condition(ConditionType.STUCK), new.condition(ConditionType.STUCK)
    if after is None or after.status != "True" or (before is not None and before.reason == after.reason):
        return []
    return [Event(reason=Reason(after.reason), message=after.message[:1000], type="Warning")]


def _report_end(old: Status, new: Status) -> list[Event]:
    """Report the end of the run, unless a failed stage was its reason: that has an event of its own."""
    found = [
        (new.condition(type_), kind)
        for type_, kind in _FINAL_CONDITIONS
        if new.is_true(type_) and not old.is_true(type_)
    ]
    return [
        Event(reason=Reason(end.reason), message=end.message[:1].upper() + end.message[1:], type=kind)
        for end, kind in found
        if end is not None and end.reason != Reason.STAGE_FAILED
    ]
