"""Enforce `spec.activeDeadlineSeconds` and `spec.ttlSecondsAfterFinished`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from msgspec import UNSET

from sailvl_operator.api.status import Goodput, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core import goodput
from sailvl_operator.core.stage_view import StageTransition
from sailvl_operator.core.units import parse_time

_INACTIVE_BUCKETS = ("suspended", "queued")
"""Goodput buckets in which a run isn't active, because its workers wait for the user or for a queue."""


def find_active_seconds_left(run: Run, status: Status, stages: Sequence[StageTransition], *, now: float) -> float:
    """Return the seconds for which the run may still be active; infinite if it has no deadline."""
    limit = run.spec.active_deadline_seconds
    if limit is UNSET:
        return inf
    ledger, _ = goodput.account(status, stages, now=now)
    return limit - count_active_seconds(ledger)


def count_active_seconds(ledger: Goodput) -> int:
    """Return the seconds in which the run was neither suspended nor queued."""
    return sum(ledger.seconds.values()) - sum(ledger.seconds.get(bucket, 0) for bucket in _INACTIVE_BUCKETS)


def find_expiry(run: Run, status: Status) -> float | None:
    """Return the Unix seconds at which a finished run is deleted; None if it is kept."""
    ttl = run.spec.ttl_seconds_after_finished
    if ttl is UNSET or not status.completion_time:
        return None
    return parse_time(status.completion_time) + ttl
