"""How long a run may be active, and how long it stays once it has ended; called by `reconcile`."""

from __future__ import annotations

from msgspec import UNSET

from sailvl_operator.api.status import ConditionType, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core.observe import parse_time


def find_deadline(run: Run, status: Status) -> float | None:
    """Unix seconds at which the run will have been active for too long; None: never, or not while it is suspended."""
    limit = run.spec.active_deadline_seconds
    is_suspended = run.spec.suspend or status.is_true(ConditionType.SUSPENDED)
    if limit is UNSET or is_suspended or not status.start_time:
        return None
    ledger = status.goodput
    active = sum(ledger.seconds.values()) - ledger.seconds.get("suspended", 0)
    return parse_time(ledger.settled_at or status.start_time) + limit - active


def find_expiry(run: Run, status: Status) -> float | None:
    """Unix seconds at which a finished run is deleted; None: it stays."""
    ttl = run.spec.ttl_seconds_after_finished
    if ttl is UNSET or not status.completion_time:
        return None
    return parse_time(status.completion_time) + ttl
