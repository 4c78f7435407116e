"""The result of `reconcile` as plain data; `cluster/apply.py` or local mode executes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from sailvl_operator.api.status import Reason, Status
from sailvl_operator.api.types import Workers
from sailvl_operator.core.observe import JobRecord
from sailvl_trainer.contract import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptSpec:
    """An attempt that is ready to start; `desired.workload` builds its AppDef and `desired.manifests` its Job."""

    document: Stage
    """Stage config that the workers read."""
    workers: Workers
    """Workers of the stage merged over those of the run and the defaults, so that fields with a default are set."""
    image: str
    image_pull_policy: str
    in_place_restarts: int
    """Restarts of the ranks within the attempt that its workers may do themselves."""
    stall_timeout_seconds: int
    grace_seconds: int
    """Seconds between SIGTERM and SIGKILL, in which a worker saves a checkpoint."""
    claim: str
    """Name of the PersistentVolumeClaim that is mounted as storage."""
    owner_name: str
    """Name of the run, which owns the Job."""
    owner_uid: str
    excluded_nodes: tuple[str, ...] = ()
    """Nodes on which no worker may run, because they failed too often."""
    suspect_nodes: tuple[str, ...] = ()
    """Nodes that are used only if no other has room, because the last attempt failed there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A Kubernetes event about the run."""

    reason: Reason
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


class DeletionMode(enum.Enum):
    """When a Job is deleted, and how long its workers have to exit."""

    BEFORE_STARTS = "BeforeStarts"
    """Before any attempt is started, with one second of grace: workers of the Job may still come up and use GPUs."""
    FORCE = "Force"
    """After attempts were started, with one second of grace: the attempt is dead, and hung ranks would hold GPUs."""
    GRACEFUL = "Graceful"
    """After all other writes to Jobs, with the whole grace period, so that workers save a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """A Job to delete together with its pods."""

    job: JobRecord
    mode: DeletionMode


class NetworkPolicyAction(enum.Enum):
    """Change of the NetworkPolicy of a run."""

    CREATE = "Create"
    UPDATE = "Update"
    """Give it the spec that follows from the settings of the operator."""
    DELETE = "Delete"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Everything that one reconcile wants done; an empty decision changes nothing.

    Deletions and starts come in the order of `DeletionMode`; the status is written after them, and events are
    recorded only once it was written.
    """

    deletions: tuple[Deletion, ...] = ()
    suspend: tuple[tuple[JobRecord, bool], ...] = ()
    """Jobs whose `spec.suspend` changes, with the new value."""
    start: tuple[AttemptSpec, ...] = ()
    """Attempts whose claim and Job are created. The number of a later attempt is in the written status already."""
    ensure_service: bool = False
    """Whether the run's Service has to be created."""
    network_policy: NetworkPolicyAction | None = None
    """Change of the NetworkPolicy, which is made before an attempt is started; None leaves it as it is."""
    delete_run: bool = False
    """Whether the run is deleted; the garbage collector then deletes its objects."""
    clear_restart_request: bool = False
    """Whether the restart annotation is removed, because the status shows that the request was handled."""
    status: Status | None = None
    """The complete new status; None if nothing has changed."""
    is_urgent: bool = False
    """Whether something waits for the status: a later attempt for its number, or later stages for the end of one."""
    events: tuple[Event, ...] = ()
    requeue_at: float | None = None
    """Unix seconds of the next reconcile if nothing happens before; None if none is needed."""

    @property
    def may_be_deferred(self) -> bool:
        """Whether there is a status or a Service to write, and nothing waits for it."""
        return (self.status is not None or self.ensure_service) and not self.is_urgent

    def get_deleted_jobs(self, mode: DeletionMode) -> list[JobRecord]:
        """Return the Jobs that are deleted in a mode."""
        return [deletion.job for deletion in self.deletions if deletion.mode is mode]
