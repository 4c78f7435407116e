"""When a status that differs in nothing but progress and ready workers is written: now and then; every write costs."""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import StageStatus, Status
from sailvl_operator.core.units import parse_time


def put_off(old: Status, new: Status, *, interval: float, now: float) -> float | None:
    """Unix seconds until which the write can wait; None: write at once."""
    if _essence(old) != _essence(new):
        return None
    due = parse_time(old.goodput.settled_at) + interval
    return due if due > now else None


def _essence(status: Status) -> Status:
    """Without what changes while nothing has happened. A new checkpoint is something; one more worker that is ready
    isn't, until all are."""
    summary = msgspec.structs.replace(status.summary, progress="", eta="", ready="")
    return msgspec.structs.replace(status, summary=summary, stages=[_calm(stage) for stage in status.stages])


def _calm(stage: StageStatus) -> StageStatus:
    return msgspec.structs.replace(stage, progress=None, metrics={}) if stage.state == "Running" else stage
