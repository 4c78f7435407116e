"""How long a run may be active, and how long it stays once it has ended; called by `reconcile`."""

from __future__ import annotations

from math import inf

from msgspec import UNSET

from sailvl_operator.api.status import Goodput, Status
from sailvl_operator.api.types import Run
from sailvl_operator.core.units import parse_time


def count_active(ledger: Goodput) -> int:
    """Seconds in which the run had workers, or wanted them of nobody's queue: suspension and queues don't count."""
    idle = sum(ledger.seconds.get(bucket, 0) for bucket in ("suspended", "queued"))
    return sum(ledger.seconds.values()) - idle


def find_rest(run: Run, ledger: Goodput) -> float:
    """Seconds for which the run may be active yet; infinite: for ever."""
    limit = run.spec.active_deadline_seconds
    return inf if limit is UNSET else limit - count_active(ledger)


def find_expiry(run: Run, status: Status) -> float | None:
    """Unix seconds at which a finished run is deleted; None: it stays."""
    ttl = run.spec.ttl_seconds_after_finished
    if ttl is UNSET or not status.completion_time:
        return None
    return parse_time(status.completion_time) + ttl
