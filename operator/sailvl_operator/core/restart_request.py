"""What a person asks for by annotation: `sailvl.dev/restart-stage: NAME` starts a stage again.

The value is noted in the status with the restart itself, then the annotation is taken off, then the note: so a crash in
between neither loses the request nor carries it out twice.
"""

from __future__ import annotations

from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType, Reason, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core.decision import Event

NOTE_LENGTH = 64


def find_request(run: Run, status: Status) -> str:
    """The stage to start again; empty: nothing new is asked for."""
    asked = run.restart_stage[:NOTE_LENGTH]
    return "" if asked == status.observed_restart_request else asked


def is_to_be_taken_off(run: Run, status: Status) -> bool:
    """Whether the annotation was acted upon and is still there."""
    return bool(run.restart_stage) and run.restart_stage[:NOTE_LENGTH] == status.observed_restart_request


def refuse_request(stage: str, status: Status, *, is_suspended: bool) -> tuple[Event, ...]:
    """Why a stage can't be started again, as an event; nothing when it can."""
    states = {s.name: s.state for s in status.stages}
    state = states.get(stage)
    if state in ("Starting", "Running", "Restarting", "Failed") and not is_suspended:
        return ()
    words = {
        None: f"there is no stage {stage!r}; stages are {', '.join(states) or 'not known yet'}",
        "Pending": f"stage {stage} has not begun",
        "Suspended": _why_suspended(stage, status, is_suspended=is_suspended),
        "Succeeded": f"stage {stage} has its result, which a new attempt would find; create a run with other settings",
    }
    message = f"{names.ANNOTATION_RESTART}: {words.get(state, words['Suspended'])}"
    return (Event(reason=Reason.RESTART_REQUESTED, message=message[:1000], type="Warning"),)


def _why_suspended(stage: str, status: Status, *, is_suspended: bool) -> str:
    failed = status.condition(ConditionType.FAILED)
    if is_suspended or failed is None:
        return f"stage {stage} is suspended; set spec.suspend to false, and it goes on"
    return f"stage {stage} stopped with its run ({failed.message}); mend that, and it goes on"
