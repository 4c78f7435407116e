"""Values that the operator was installed with: they hold for every run, unless its spec says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from sailvl_operator.api import names


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Installation-wide settings that `reconcile` reads."""

    image: str = ""
    """Trainer image of runs without `spec.image`."""
    storage: str = names.STORAGE_MOUNT
    """Path at which workers find the run's storage."""
    grace_seconds: int = 120
    """Seconds between SIGTERM and SIGKILL of a worker, in which it saves a checkpoint."""
    failure_settle_seconds: float = 3.0
    """Settling time: seconds between the first sign of a failure and the choice of its cause."""
    backoff_seconds: float = 10.0
    """Seconds before the second attempt after a crash; each further crash doubles them."""
    backoff_limit_seconds: float = 300.0
    """Longest backoff in seconds."""
    progress_seconds: float = 5.0
    """Minimum seconds between two writes of a status in which nothing but progress has changed."""
