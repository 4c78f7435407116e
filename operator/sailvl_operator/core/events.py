"""The events of one decision: what became of the stages, of people's requests, of the gates and of the run."""

from __future__ import annotations

from typing import Literal

from sailvl_operator.api.status import IN_PLACE, ConditionType, Reason, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core import restart_request
from sailvl_operator.core.conditions import Outcome
from sailvl_operator.core.decision import Event

_ENDS: tuple[tuple[ConditionType, Literal["Normal", "Warning"]], ...] = (
    (ConditionType.SUCCEEDED, "Normal"),
    (ConditionType.FAILED, "Warning"),
)


def collect_events(run: Run, old: Status, new: Status, outcome: Outcome) -> tuple[Event, ...]:
    """In the order in which things happened."""
    events = [event for step in outcome.steps for event in step.events]
    asked = restart_request.find_request(run, old)
    if asked:
        events += restart_request.refuse_request(asked, old, is_suspended=run.spec.suspend)
    return tuple(events + _tell_in_place(old, new) + _tell_gates(outcome) + _tell_stuck(old, new) + _tell_end(old, new))


def _tell_in_place(old: Status, new: Status) -> list[Event]:
    before = {stage.name: stage.restarts.get(IN_PLACE, 0) for stage in old.stages}
    return [
        Event(
            reason=Reason.RESTARTED_IN_PLACE,
            type="Warning",
            message=f"Stage {stage.name}, attempt {stage.attempt}: ranks failed and were started again in place; "
            "the workers' logs say why",
        )
        for stage in new.stages
        if stage.restarts.get(IN_PLACE, 0) > before.get(stage.name, 0)
    ]


def _tell_stuck(old: Status, new: Status) -> list[Event]:
    """Once a reason; its words may change while it lasts."""
    before, after = old.condition(ConditionType.STUCK), new.condition(ConditionType.STUCK)
    if after is None or after.status != "True" or (before is not None and before.reason == after.reason):
        return []
    return [Event(reason=Reason(after.reason), message=after.message[:1000], type="Warning")]


def _tell_end(old: Status, new: Status) -> list[Event]:
    """A stage that failed has told of it itself."""
    found = [(new.condition(end), kind) for end, kind in _ENDS if new.is_true(end) and not old.is_true(end)]
    return [
        Event(reason=Reason(end.reason), message=end.message[:1].upper() + end.message[1:], type=kind)
        for end, kind in found
        if end is not None and end.reason != Reason.STAGE_FAILED
    ]


def _tell_gates(outcome: Outcome) -> list[Event]:
    """Of gates whose ruling is new."""
    words = {view.status.name: view.status.gate for view in outcome.views}
    return [
        Event(
            reason=Reason.GATE_PASSED if ruling.is_passed else Reason.GATE_FAILED,
            message=f"Stage {ruling.stage}: {ruling.message}"[:1000],
            type="Normal" if ruling.is_passed else "Warning",
        )
        for ruling in outcome.rulings
        if words[ruling.stage] != ruling.message[:1000]
    ]
