"""What `reconcile` wants done: plain data that the engine (on a cluster) or local mode carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailvl_operator.api.status import Reason, Status
from sailvl_operator.api.types import Workers
from sailvl_operator.core.observe import JobRecord
from sailvl_trainer.contract import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt of a stage, ready to start: `desired.workload` turns it into an AppDef, `desired.job` into a Job."""

    document: Stage
    """What the worker is told."""
    workers: Workers
    """Merged: the stage's over the run's over the defaults; no field is UNSET that has a default."""
    image: str
    image_pull_policy: str
    in_place_restarts: int
    stall_timeout_seconds: int
    grace_seconds: int
    """Between SIGTERM and SIGKILL: time for a checkpoint."""
    claim: str
    """The PersistentVolumeClaim mounted as storage."""
    owner_name: str
    owner_uid: str
    """The run, which owns the Job."""
    avoid_nodes: tuple[str, ...] = ()
    """Machines that took so many attempts down that they get none of these workers."""
    doubted_nodes: tuple[str, ...] = ()
    """Machines that are chosen last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A Kubernetes event on the run."""

    reason: Reason
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Attempts are started, then dead ones ended; events and metrics come only after the status was written."""

    clear: tuple[JobRecord, ...] = ()
    """Attempts that were given up and might come to life yet: ended before any other is started."""
    end: tuple[JobRecord, ...] = ()
    """Dead attempts: their pods deleted with 1 s of grace, then the Jobs. A record without uid: its pods only."""
    suspend: tuple[tuple[JobRecord, bool], ...] = ()
    """Jobs whose `suspend` has to change."""
    withdraw: tuple[JobRecord, ...] = ()
    """Jobs to delete, their workers with the whole grace: for a suspension where a queue holds the Job's `suspend`."""
    start: tuple[Attempt, ...] = ()
    """First attempts, and later ones whose number is in status already; create the claim where missing, then the
    Job."""
    serve: bool = False
    """The run's Service has to be created."""
    delete_run: bool = False
    """The run itself goes, its children with it."""
    take_off_request: bool = False
    """The annotation that asked for a restart was acted upon."""
    status: Status | None = None
    """The whole new status; None: nothing changed, nothing is written."""
    is_pressing: bool = False
    """Something waits for the status: a later attempt for its number, what follows a stage for its end."""
    events: tuple[Event, ...] = ()
    requeue_at: float | None = None
    """Unix seconds at which to look again though nothing happened."""

    @property
    def can_wait(self) -> bool:
        """Whether there is something to write, and nothing waits for it."""
        return (self.status is not None or self.serve) and not self.is_pressing
