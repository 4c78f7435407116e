"""Restart a stage on request: the user annotates the run with `sailvl.dev/restart-stage: NAME`.

The status records the value together with the restart; then the annotation is removed, and finally the record. A crash
between two of these writes therefore neither loses a request nor handles it twice.
"""

from __future__ import annotations

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType, Reason, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core.decision import Event
from sailvl_operator.core.restart_policy import bump_attempt
from sailvl_operator.core.stage_view import StageTransition, StageView

MAX_REQUEST_LENGTH = 64
"""Letters of the annotation that are compared and recorded."""

_RESTARTABLE = frozenset({"Starting", "Running", "Restarting", "Failed"})
"""States of a stage that can be restarted on request."""


def find_request(run: Run, status: Status) -> str:
    """Return the stage that the user asks to restart; empty if there is no request or it was handled."""
    request = run.restart_stage[:MAX_REQUEST_LENGTH]
    return "" if request == status.observed_restart_request else request


def is_handled(run: Run, status: Status) -> bool:
    """Return whether the status records the request that the annotation still holds."""
    return bool(run.restart_stage) and run.restart_stage[:MAX_REQUEST_LENGTH] == status.observed_restart_request


def restart_on_request(view: StageView) -> StageTransition | None:
    """Start a new attempt at once, with full budgets and no excluded node; None if the request can't be served."""
    if view.status.state not in _RESTARTABLE or view.run.spec.suspend:
        return None
    status = msgspec.structs.replace(
        bump_attempt(view.latest),
        state="Restarting",
        counted_restarts={},
        short_attempts=0,
        node_failures={},
        next_attempt_time="",
        completion_time="",
    )
    message = f"Restarting stage {status.name} as attempt {status.attempt}, as requested"
    event = Event(reason=Reason.RESTART_REQUESTED, message=message)
    return StageTransition(view=view, status=status, events=(event,))


def explain_refusal(request: str, status: Status, *, is_suspended: bool) -> tuple[Event, ...]:
    """Return an event that says why a stage can't be restarted; none if it can."""
    states = {stage.name: stage.state for stage in status.stages}
    state = states.get(request)
    if state in _RESTARTABLE and not is_suspended:
        return ()
    messages = {
        None: f"there is no stage {request!r}; stages are {', '.join(states) or 'not known yet'}",
        "Pending": f"stage {request} has not started",
        "Succeeded": f"stage {request} has its result, which a new attempt would reuse; "
        "create a run with other settings",
    }
    message = messages.get(state) or _explain_suspension(request, status, is_suspended=is_suspended)
    event_message = f"{names.ANNOTATION_RESTART}: {message}"
    return (Event(reason=Reason.RESTART_REQUESTED, message=event_message[:1000], type="Warning"),)


def _explain_suspension(stage: str, status: Status, *, is_suspended: bool) -> str:
    failed = status.condition(ConditionType.FAILED)
    if is_suspended or failed is None:
        return f"stage {stage} is suspended; set spec.suspend to false to resume it"
    return f"stage {stage} was suspended because its run failed ({failed.message}); it resumes once that is fixed"
