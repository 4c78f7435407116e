"""What the operator sees, as small typed records: raw Jobs and pods are trimmed to these at the informer's edge, and
sorted once into an `Observed` for `reconcile`. Local mode makes the same records from its processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import msgspec
from msgspec.structs import replace

from sailvl_operator.api import names
from sailvl_trainer.contract import Progress

CONFIG_WAITS = frozenset({"InvalidImageName", "CreateContainerConfigError"})
"""What containers wait for because of the pod's own words."""


class Terminated(msgspec.Struct, frozen=True, kw_only=True):
    """How the worker's container ended."""

    exit_code: int
    reason: str = ""
    """Error, Completed, OOMKilled, …"""
    message: str = ""
    """The termination message: JSON of contract.Termination, or the log's tail."""
    finished: float = 0.0
    """Unix seconds."""


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    namespace: str
    name: str
    uid: str
    run: str
    stage: str
    attempt: int
    index: int
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown."""
    run_uid: str = ""
    """Empty: an earlier version made it."""
    node: str = ""
    ip: str = ""
    created: float = 0.0
    placed: float = 0.0
    """Unix seconds at which it was given to a node; 0: not yet."""
    is_ready: bool = False
    is_deleting: bool = False
    delete_by: float = 0.0
    """Unix seconds at which the grace of one that is deleted ends; 0: not known."""
    is_gone: bool = False
    """Deleted from the API; this is its last state, kept until its attempt is closed."""
    terminated: Terminated | None = None
    ended_seen: float = 0.0
    """Unix seconds by our own clock at which the first sign of its end was seen; 0: there is none."""
    waiting_reason: str = ""
    """ImagePullBackOff, CreateContainerConfigError, …"""
    waiting_message: str = ""
    scheduler: str = ""
    """Who is to give it a node."""
    unschedulable: str = ""
    """The scheduler's words, if it found no node."""
    disrupted: str = ""
    """Reason and message of the DisruptionTarget condition."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
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
    """Unix seconds at which it was created or, where a queue holds Jobs back, let go; 0: not yet."""
    is_gone: bool = False
    """Deleted from the API; kept until its attempt is closed."""
    queue: str = ""
    """Kueue's queue that holds it back and lets it go."""
    is_suspended_here: bool = False
    """By us, with its run."""
    gpus: int | None = None
    """A worker; None: not known."""
    digest: str = ""
    """The first letters of its stage's; empty: an earlier version made it."""


class ServiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    namespace: str
    name: str
    uid: str
    run: str
    owner_uid: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """One run's children, by stage and attempt; pods by index."""

    jobs: Mapping[tuple[str, int], JobRecord] = field(default_factory=dict)
    removed: frozenset[tuple[str, int]] = frozenset()
    """Attempts whose Job was there and is gone."""
    pods: Mapping[tuple[str, int], tuple[PodRecord, ...]] = field(default_factory=dict)
    progress: Mapping[tuple[str, int], Progress] = field(default_factory=dict)
    """What the workers last said of themselves, by stage and attempt."""
    unheard: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Attempts that run and have never told how far they are, with the reason."""
    complaints: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Why an attempt doesn't start, in the words of whoever holds it back, by stage and attempt."""
    refusals: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """What the API server refuses to make of what an attempt needs, and why, by stage and attempt."""
    is_served: bool = True
    """Whether the run's Service is there."""


def observe(
    jobs: Iterable[JobRecord],
    pods: Iterable[PodRecord],
    progress: Mapping[tuple[str, int], Progress] | None = None,
    complaints: Mapping[tuple[str, int], str] | None = None,
    *,
    refusals: Mapping[tuple[str, int], str] | None = None,
    unheard: Mapping[tuple[str, int], str] | None = None,
    is_served: bool = True,
) -> Observed:
    """Sort a run's children once; the newest pod of an index comes last."""
    by_attempt: dict[tuple[str, int], list[PodRecord]] = {}
    for pod in sorted(pods, key=lambda p: (p.index, p.created, p.uid)):
        by_attempt.setdefault((pod.stage, pod.attempt), []).append(pod)
    sorted_jobs = {(job.stage, job.attempt): job for job in sorted(jobs, key=lambda job: not job.is_gone)}
    return Observed(
        jobs={key: job for key, job in sorted_jobs.items() if not job.is_gone},
        removed=frozenset(key for key, job in sorted_jobs.items() if job.is_gone),
        pods={key: tuple(group) for key, group in by_attempt.items()},
        progress=progress or {},
        unheard=unheard or {},
        complaints=complaints or {},
        refusals=refusals or {},
        is_served=is_served,
    )


def parse_job(raw: Mapping[str, Any]) -> JobRecord:
    """Trim a batch/v1 Job that carries our labels."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    queue, created = labels.get(names.LABEL_KUEUE_QUEUE, ""), parse_time(metadata.get("creationTimestamp"))
    return JobRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=labels.get(names.LABEL_RUN, ""),
        stage=labels.get(names.LABEL_STAGE, ""),
        attempt=_parse_number(labels.get(names.LABEL_ATTEMPT)),
        owner_uid=_find_owner(metadata),
        is_suspended=bool(spec.get("suspend")),
        is_deleting="deletionTimestamp" in metadata,
        nodes=spec.get("completions", 1),
        created=created,
        started=parse_time(status.get("startTime")) or (0.0 if queue or _was_suspended(status) else created),
        queue=queue,
        is_suspended_here=names.LABEL_SUSPENDED in labels,
        gpus=_count_gpus(spec),
        digest=labels.get(names.LABEL_DIGEST, ""),
    )


def _was_suspended(status: Mapping[str, Any]) -> bool:
    """By the Job controller's last word: one that was just let go has its start time a moment later."""
    return any(c["type"] == "Suspended" and c["status"] == "True" for c in status.get("conditions", []))


def _count_gpus(spec: Mapping[str, Any]) -> int:
    """A worker's, by the limits of a Job's pods."""
    containers = spec.get("template", {}).get("spec", {}).get("containers", [])
    found = (
        c.get("resources", {}).get("limits", {}).get(names.GPU) for c in containers if c["name"] == names.CONTAINER
    )
    return _parse_number(next(found, None))


def parse_service(raw: Mapping[str, Any]) -> ServiceRecord:
    """Trim a v1 Service that carries our labels."""
    metadata = raw["metadata"]
    return ServiceRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=metadata.get("labels", {}).get(names.LABEL_RUN, ""),
        owner_uid=_find_owner(metadata),
    )


def parse_pod(raw: Mapping[str, Any]) -> PodRecord:
    """Trim a v1 Pod that carries our labels."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    state = _container_state(status)
    is_unplaced = conditions.get("PodScheduled", {}).get("status") == "False"
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    return PodRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=labels.get(names.LABEL_RUN, ""),
        run_uid=labels.get(names.LABEL_RUN_UID, ""),
        stage=labels.get(names.LABEL_STAGE, ""),
        attempt=_parse_number(labels.get(names.LABEL_ATTEMPT)),
        index=_parse_number(labels.get(names.LABEL_COMPLETION_INDEX)),
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName", ""),
        ip=status.get("podIP", ""),
        created=parse_time(metadata.get("creationTimestamp")),
        placed=parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else 0.0,
        is_ready=conditions.get("Ready", {}).get("status") == "True",
        is_deleting="deletionTimestamp" in metadata,
        delete_by=parse_time(metadata.get("deletionTimestamp")),
        terminated=_parse_terminated(state.get("terminated")),
        waiting_reason=state.get("waiting", {}).get("reason", ""),
        waiting_message=state.get("waiting", {}).get("message", ""),
        scheduler=spec.get("schedulerName", ""),
        unschedulable=scheduled.get("message") or scheduled.get("reason", "") if is_unplaced else "",
        disrupted=_words(disruption) if disruption.get("status") == "True" else "",
    )


def stamp_pod(pod: PodRecord, known: PodRecord | None, now: float) -> PodRecord:
    """With the time of the first sign of its end: the cluster's clocks need not agree with ours. A sign that passes, as
    the silence of a node that comes back, was none; the end itself counts anew, since others may end with it."""
    is_over = pod.is_gone or pod.terminated is not None or pod.disrupted or pod.phase == "Failed"
    is_bad = is_over or pod.waiting_reason in CONFIG_WAITS
    has_ended = pod.is_gone or pod.terminated is not None
    if known is not None and known.ended_seen and has_ended == (known.is_gone or known.terminated is not None):
        lasts = is_bad or (not pod.is_ready and known.waiting_reason not in CONFIG_WAITS)
        return replace(pod, ended_seen=known.ended_seen) if lasts else pod
    went_silent = known is not None and known.is_ready and not pod.is_ready
    return replace(pod, ended_seen=now) if is_bad or went_silent else pod


def is_calm_pod(pod: PodRecord) -> bool:
    """Whether it only comes to run: nobody has to do anything about that, but tell."""
    is_hurt = pod.ended_seen or pod.disrupted or pod.terminated is not None or pod.phase == "Failed"
    is_waiting = pod.waiting_reason not in ("", "ContainerCreating", "PodInitializing")
    return not (is_hurt or pod.is_gone or pod.is_deleting or pod.unschedulable or is_waiting)


def is_calm_job(job: JobRecord) -> bool:
    """Whether it only exists."""
    return not (job.is_gone or job.is_deleting or job.is_suspended or job.queue)


@lru_cache(maxsize=4096)  # the moments of a run's status and of its children are read at every look
def parse_time(text: str | None) -> float:
    """RFC 3339 to Unix seconds; nothing is 0."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _parse_number(text: str | None) -> int:
    """Of a label, which anybody may set to anything."""
    return int(text) if text is not None and text.isdecimal() else 0


def _find_owner(metadata: Mapping[str, Any]) -> str:
    return next((o["uid"] for o in metadata.get("ownerReferences", []) if o.get("controller")), "")


def _container_state(status: Mapping[str, Any]) -> Mapping[str, Any]:
    for container in status.get("containerStatuses", []):
        if container["name"] == names.CONTAINER:
            state: Mapping[str, Any] = container.get("state", {})
            return state
    return {}


def _parse_terminated(state: Mapping[str, Any] | None) -> Terminated | None:
    if state is None:
        return None
    return Terminated(
        exit_code=state.get("exitCode", -1),
        reason=state.get("reason", ""),
        message=state.get("message", ""),
        finished=parse_time(state.get("finishedAt")),
    )


def _words(condition: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
