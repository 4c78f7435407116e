"""Throttle writes of a status in which nothing but progress and the number of ready workers has changed.

Every write costs the API server and etcd, and with many runs together the progress would dominate both.
"""

from __future__ import annotations

import msgspec

from sailvl_operator.api.status import StageStatus, Status
from sailvl_operator.core.units import parse_time


def find_deferral(old: Status, new: Status, *, interval: float, now: float) -> float | None:
    """Return the Unix seconds until which the write may wait; None if it is due or there is nothing to write.

    `interval` is the minimum number of seconds between two such writes.
    """
    if new == old or _drop_continuous_fields(old) != _drop_continuous_fields(new):
        return None
    due = parse_time(old.goodput.settled_at) + interval
    return due if due > now else None


def _drop_continuous_fields(status: Status) -> Status:
    """Drop the fields that change continuously: progress, ETA, ready workers and metrics.

    A new checkpoint still counts as a change, and so does the moment in which all workers are ready.
    """
    summary = msgspec.structs.replace(status.summary, progress="", eta="", ready="")
    return msgspec.structs.replace(status, summary=summary, stages=[_drop_progress(stage) for stage in status.stages])


def _drop_progress(stage: StageStatus) -> StageStatus:
    return msgspec.structs.replace(stage, progress=None, metrics={}) if stage.state == "Running" else stage
