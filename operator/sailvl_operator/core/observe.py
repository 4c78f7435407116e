"""Records of a run's objects, those of its Jobs and pods sorted by attempt into the `Observed` that `reconcile` reads.

On a cluster `cluster/parse.py` builds the records from Kubernetes objects; local mode builds them from its processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from sailvl_operator.api.status import Reason
from sailvl_trainer.contract import Progress, Termination

AttemptKey = tuple[str, int]
"""Stage name and attempt number."""

INVALID_CONFIG_REASONS = frozenset({"InvalidImageName", "CreateContainerConfigError"})
"""Reasons of a waiting container that the pod's own spec causes."""


class Terminated(msgspec.Struct, frozen=True, kw_only=True):
    """The terminated state of the worker's container."""

    exit_code: int
    reason: str = ""
    """Reason that the kubelet gives: Error, Completed, OOMKilled, …"""
    message: str = ""
    """Termination message if it isn't a report: usually the tail of the log."""
    report: Termination | None = None
    """Termination message if it is a report of the worker, decoded and bounded by `reports.py`."""
    finished: float = 0.0
    """End of the container in Unix seconds."""


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's pod, reduced to what the core reads."""

    namespace: str
    name: str
    uid: str
    run: str
    stage: str
    attempt: int
    index: int
    phase: str
    """Phase of the pod: Pending, Running, Succeeded, Failed or Unknown."""
    run_uid: str = ""
    """UID of the run; empty if a version of the operator created the pod that didn't set this label."""
    node: str = ""
    ip: str = ""
    """Address of the pod; empty if it has none of its own, because it uses the network of its node."""
    owner_uid: str = ""
    """UID of the Job that controls the pod; empty if the pod's name, labels and controller don't fit together."""
    created: float = 0.0
    placed: float = 0.0
    """Unix seconds at which the pod was scheduled to a node; 0 before that."""
    is_ready: bool = False
    is_deleting: bool = False
    delete_by: float = 0.0
    """Unix seconds at which the grace period of a deleted pod ends; 0 if it isn't being deleted."""
    is_gone: bool = False
    """Whether the pod was deleted from the API; its last state is kept until its attempt is closed."""
    terminated: Terminated | None = None
    ended_seen: float = 0.0
    """Unix seconds, by the operator's clock, at which the first sign of the pod's end was observed; 0 if none was."""
    waiting_reason: str = ""
    """Reason of the waiting container: ImagePullBackOff, CreateContainerConfigError, …"""
    waiting_message: str = ""
    scheduler: str = ""
    """Name of the scheduler that is responsible for the pod."""
    unschedulable: str = ""
    """Message of the scheduler if it found no node."""
    disrupted: str = ""
    """Reason and message of the DisruptionTarget condition if it is true."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The Job of an attempt, reduced to what the core reads."""

    namespace: str
    name: str
    uid: str
    run: str
    stage: str
    attempt: int
    owner_uid: str
    is_suspended: bool = False
    is_deleting: bool = False
    nodes: int = 1
    created: float = 0.0
    started: float = 0.0
    """Unix seconds at which the Job started: its creation, or its admission by a queue; 0 before that."""
    is_gone: bool = False
    """Whether the Job was deleted from the API, or lost its labels; the record is kept until its attempt is closed."""
    gone_at: float = 0.0
    """Unix seconds, by the operator's clock, at which that was observed; 0 if it wasn't."""
    queue: str = ""
    """Kueue queue that admits the Job."""
    is_suspended_here: bool = False
    """Whether this operator suspended the Job, because its run is suspended."""
    gpus: int | None = None
    """GPUs of one worker; None if unknown."""
    digest: str = ""
    """First letters of the stage's digest; empty if a version of the operator created the Job that didn't set them."""
    alteration: str = ""
    """How the Job differs from what the operator creates, because it was edited or made by another client; empty if it
    doesn't."""


class ServiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The Service of a run, reduced to what the operator reads."""

    namespace: str
    name: str
    uid: str
    run: str
    owner_uid: str


class NetworkPolicyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The NetworkPolicy of a run, reduced to what the operator reads."""

    namespace: str
    name: str
    uid: str
    run: str
    owner_uid: str
    is_current: bool
    """Whether its spec is the one that the operator builds with its present settings."""


NetworkPolicyState = Literal["Missing", "Outdated", "Current"]
"""State of a run's NetworkPolicy: it doesn't exist, its spec differs from the one to be built, or it is as built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """Problem that keeps an attempt from starting or from getting its objects."""

    message: str
    reason: Reason | None = None
    """Reason for the Stuck condition; None if it has to be found in the message, which then is of the API server, a
    controller or a kubelet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptObservation:
    """Everything that was observed of one attempt."""

    job: JobRecord | None = None
    gone_job: JobRecord | None = None
    """The attempt's Job if it existed and was deleted, or lost its labels."""
    altered_job: JobRecord | None = None
    """The attempt's Job if it was altered; `job` is then None, since nothing in it can be relied on."""
    pods: tuple[PodRecord, ...] = ()
    """Pods in the order of their index; of one index the newest comes last."""
    progress: Progress | None = None
    """Progress that the workers reported last."""
    progress_error: str = ""
    """Why the progress of running workers could never be read."""
    obstacle: Obstacle | None = None
    """Why the attempt doesn't start, as the scheduler, a controller, the kubelet or Kueue reports it."""
    refusal: Obstacle | None = None
    """Error with which the API server refused an object of the attempt."""


NOTHING_OBSERVED = AttemptObservation()
"""Observation of an attempt of which nothing exists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """The observations of one run by attempt."""

    attempts: Mapping[AttemptKey, AttemptObservation] = field(default_factory=dict)
    jobs: tuple[JobRecord, ...] = ()
    """All Jobs that exist, altered ones included, in the order of stage and attempt."""
    has_service: bool = True
    """Whether the run's Service exists."""
    network_policy: NetworkPolicyState = "Current"

    def get(self, stage: str, attempt: int) -> AttemptObservation:
        """Return the observation of an attempt; it is empty if nothing of the attempt exists."""
        return self.attempts.get((stage, attempt), NOTHING_OBSERVED)


def has_live_pods(attempt: AttemptObservation) -> bool:
    """Return whether pods of an attempt exist that have neither ended nor are being deleted."""
    return any(not (pod.is_gone or pod.is_deleting) and pod.terminated is None for pod in attempt.pods)


def observe(
    jobs: Iterable[JobRecord] = (),
    pods: Iterable[PodRecord] = (),
    *,
    progress: Mapping[AttemptKey, Progress] | None = None,
    progress_errors: Mapping[AttemptKey, str] | None = None,
    obstacles: Mapping[AttemptKey, Obstacle] | None = None,
    refusals: Mapping[AttemptKey, Obstacle] | None = None,
    has_service: bool = True,
    network_policy: NetworkPolicyState = "Current",
) -> Observed:
    """Sort the records and reports of one run by attempt."""
    by_age = sorted(jobs, key=lambda job: (not job.is_gone, job.created))
    jobs_by_attempt = {(job.stage, job.attempt): job for job in by_age}
    pods_by_attempt: dict[AttemptKey, list[PodRecord]] = {}
    for pod in sorted(pods, key=lambda p: (p.index, p.created, p.uid)):
        pods_by_attempt.setdefault((pod.stage, pod.attempt), []).append(pod)
    progress, progress_errors = progress or {}, progress_errors or {}
    obstacles, refusals = obstacles or {}, refusals or {}
    keys = set[AttemptKey]().union(jobs_by_attempt, pods_by_attempt, progress, progress_errors, obstacles, refusals)
    attempts: dict[AttemptKey, AttemptObservation] = {}
    for key in sorted(keys):
        job = jobs_by_attempt.get(key)
        attempts[key] = AttemptObservation(
            job=job if job is not None and not job.is_gone and not job.alteration else None,
            gone_job=job if job is not None and job.is_gone else None,
            altered_job=job if job is not None and not job.is_gone and job.alteration else None,
            pods=tuple(pods_by_attempt.get(key, ())),
            progress=progress.get(key),
            progress_error=progress_errors.get(key, ""),
            obstacle=obstacles.get(key),
            refusal=refusals.get(key),
        )
    existing = tuple(jobs_by_attempt[key] for key in sorted(jobs_by_attempt) if not jobs_by_attempt[key].is_gone)
    return Observed(attempts=attempts, jobs=existing, has_service=has_service, network_policy=network_policy)
