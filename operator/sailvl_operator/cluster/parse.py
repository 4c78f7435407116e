"""Parse owned objects, as `resources.py` declares them, into the records that the core works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from msgspec.structs import replace

from sailvl_operator.api import names
from sailvl_operator.api.untrusted import clean_line, decode_json
from sailvl_operator.api.workers import MAX_GPUS, MAX_NODES
from sailvl_operator.core.desired.network_policy import build_policy_spec
from sailvl_operator.core.observe import (
    INVALID_CONFIG_REASONS,
    JobRecord,
    NetworkPolicyRecord,
    PodRecord,
    ServiceRecord,
    Terminated,
)
from sailvl_operator.core.ownership import describe_shape, has_indexed_name, split_job_name
from sailvl_operator.core.reports import MAX_MESSAGE_LENGTH, build_terminated
from sailvl_operator.core.units import parse_time

_MAX_DIGITS = 10
"""Digits of a label that are read; no number of the operator's has as many."""
_MAX_WORD_LENGTH = 253
"""Letters of the names and reasons that are kept; the API server does not limit all of them."""
_MAX_UID_LENGTH = 64
"""Letters of a UID. The API server creates UIDs of 36 letters, but takes owner references with any text."""


def parse_job(raw: Mapping[str, Any]) -> JobRecord:
    """Parse a batch/v1 Job that carries the operator's labels."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    queue, created = labels.get(names.LABEL_KUEUE_QUEUE, ""), parse_time(metadata.get("creationTimestamp"))
    stage, attempt = split_job_name(metadata["name"], labels.get(names.LABEL_RUN, ""))
    return JobRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=labels.get(names.LABEL_RUN, ""),
        stage=stage,
        attempt=attempt,
        owner_uid=_find_owner_uid(metadata, names.KIND, labels.get(names.LABEL_RUN, "")),
        is_suspended=bool(spec.get("suspend")),
        is_deleting="deletionTimestamp" in metadata,
        nodes=min(max(1, spec.get("completions") or 1), MAX_NODES),
        created=created,
        started=parse_time(status.get("startTime")) or (0.0 if queue or _was_suspended(status) else created),
        queue=queue,
        is_suspended_here=names.LABEL_SUSPENDED in labels,
        gpus=_count_gpus(spec),
        digest=labels.get(names.LABEL_DIGEST, ""),
        alteration=_describe_alteration(labels, spec, stage, attempt),
    )


def parse_pod(raw: Mapping[str, Any]) -> PodRecord:
    """Parse a v1 Pod that carries the operator's labels."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    state = _find_container_state(status)
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    is_unscheduled = scheduled.get("status") == "False"
    run, stage = labels.get(names.LABEL_RUN, ""), labels.get(names.LABEL_STAGE, "")
    attempt, index = (
        _parse_number(labels.get(names.LABEL_ATTEMPT)),
        _parse_number(labels.get(names.LABEL_COMPLETION_INDEX)),
    )
    job = names.job_name(run, stage, attempt)
    return PodRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=run,
        run_uid=labels.get(names.LABEL_RUN_UID, ""),
        stage=stage,
        attempt=attempt,
        index=index,
        owner_uid=_find_owner_uid(metadata, "Job", job) if has_indexed_name(metadata["name"], job, index) else "",
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName", ""),
        ip="" if spec.get("hostNetwork") else status.get("podIP", ""),
        created=parse_time(metadata.get("creationTimestamp")),
        placed=parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else 0.0,
        is_ready=conditions.get("Ready", {}).get("status") == "True",
        is_deleting="deletionTimestamp" in metadata,
        delete_by=parse_time(metadata.get("deletionTimestamp")),
        terminated=_parse_terminated(state.get("terminated")),
        waiting_reason=state.get("waiting", {}).get("reason", "")[:_MAX_WORD_LENGTH],
        waiting_message=clean_line(state.get("waiting", {}).get("message", ""), MAX_MESSAGE_LENGTH),
        scheduler=clean_line(spec.get("schedulerName", ""), _MAX_WORD_LENGTH),
        unschedulable=_format_unscheduled(scheduled) if is_unscheduled else "",
        disrupted=_format_condition(disruption) if disruption.get("status") == "True" else "",
    )


def parse_service(raw: Mapping[str, Any]) -> ServiceRecord:
    """Parse a v1 Service that carries the operator's labels."""
    metadata = raw["metadata"]
    return ServiceRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=metadata.get("labels", {}).get(names.LABEL_RUN, ""),
        owner_uid=_find_owner_uid(metadata, names.KIND, metadata.get("labels", {}).get(names.LABEL_RUN, "")),
    )


def parse_network_policy(raw: Mapping[str, Any], *, metrics_peers: Sequence[dict[str, Any]]) -> NetworkPolicyRecord:
    """Parse a networking.k8s.io/v1 NetworkPolicy that carries the operator's labels, and compare its spec with the one
    that these peers require."""
    metadata = raw["metadata"]
    run = metadata.get("labels", {}).get(names.LABEL_RUN, "")
    owner_uid = _find_owner_uid(metadata, names.KIND, run)
    wanted = build_policy_spec(run=run, owner_uid=owner_uid, metrics_peers=metrics_peers)
    return NetworkPolicyRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        run=run,
        owner_uid=owner_uid,
        is_current=decode_policy_spec(raw, wanted) == wanted,
    )


def decode_policy_spec(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the spec of a NetworkPolicy, decoded; None if it has more than twice the bytes of the wanted spec.

    Such a policy was altered, and it would take a lot of memory: 22 MiB for 1 MiB of empty rules.
    """
    spec = raw.get("spec", {})
    content = memoryview(spec if isinstance(spec, msgspec.Raw) else msgspec.json.encode(spec))
    if content.nbytes > 2 * len(msgspec.json.encode(wanted)):
        return None
    decoded: dict[str, Any] = decode_json(content, dict, subject="the spec of a NetworkPolicy")
    return decoded


def stamp_pod(pod: PodRecord, known: PodRecord | None, now: float) -> PodRecord:
    """Set `ended_seen` to the time at which the first sign of the pod's end was observed.

    The operator's own clock is used, since the clocks of the nodes may differ. Clear the timestamp if the sign goes
    away (a node that recovers). Restart it when the container really terminates, so that its peers get the full
    settling time.
    """
    is_over = pod.is_gone or pod.terminated is not None or pod.disrupted or pod.phase == "Failed"
    is_failing = is_over or pod.waiting_reason in INVALID_CONFIG_REASONS
    has_ended = pod.is_gone or pod.terminated is not None
    if known is not None and known.ended_seen and has_ended == (known.is_gone or known.terminated is not None):
        is_lasting = is_failing or (not pod.is_ready and known.waiting_reason not in INVALID_CONFIG_REASONS)
        return replace(pod, ended_seen=known.ended_seen) if is_lasting else pod
    became_unready = known is not None and known.is_ready and not pod.is_ready
    return replace(pod, ended_seen=now) if is_failing or became_unready else pod


def stamp_job(job: JobRecord, known: JobRecord | None, now: float) -> JobRecord:
    """Set `gone_at` of a Job that is gone to the time at which that was observed."""
    return replace(job, gone_at=now) if job.is_gone and (known is None or not known.is_gone) else job


def is_routine_pod(pod: PodRecord) -> bool:
    """Return whether the pod is starting or running as expected, so that no decision depends on its change."""
    is_failing = pod.ended_seen or pod.disrupted or pod.terminated is not None or pod.phase == "Failed"
    is_waiting = pod.waiting_reason not in ("", "ContainerCreating", "PodInitializing")
    return not (is_failing or pod.is_gone or pod.is_deleting or pod.unschedulable or is_waiting)


def is_routine_job(job: JobRecord) -> bool:
    """Return whether the Job exists as the operator created it, so that no decision depends on its change."""
    return not (job.is_gone or job.is_deleting or job.is_suspended or job.queue)


def _was_suspended(status: Mapping[str, Any]) -> bool:
    """Return whether the Job controller last reported the Job as suspended; it sets the start time only later."""
    return any(c["type"] == "Suspended" and c["status"] == "True" for c in status.get("conditions", []))


def _count_gpus(spec: Mapping[str, Any]) -> int:
    """Return the GPUs of one worker, from the limits in the Job's pod template."""
    containers = spec.get("template", {}).get("spec", {}).get("containers", [])
    limits = (
        c.get("resources", {}).get("limits", {}).get(names.GPU) for c in containers if c["name"] == names.CONTAINER
    )
    return min(_parse_number(next(limits, None)), MAX_GPUS)


def _describe_alteration(labels: Mapping[str, str], spec: Mapping[str, Any], stage: str, attempt: int) -> str:
    """Return how a Job differs from what the operator creates; empty if it doesn't."""
    if labels.get(names.LABEL_MANAGED_BY) != names.FIELD_MANAGER:
        return f"it lacks the label {names.MANAGED_SELECTOR}"
    if (labels.get(names.LABEL_STAGE), labels.get(names.LABEL_ATTEMPT)) != (stage, str(attempt)):
        return f"its labels {names.LABEL_STAGE} and {names.LABEL_ATTEMPT} do not match its name"
    return describe_shape(spec.get("completionMode", ""), spec.get("completions"), spec.get("parallelism"))


def _parse_number(text: str | None) -> int:
    """Return the value of a numeric label, and 0 if the user changed it to something else. Further digits of a long
    number are ignored."""
    return int(text[:_MAX_DIGITS]) if text is not None and text.isdecimal() else 0


def _find_owner_uid(metadata: Mapping[str, Any], kind: str, name: str) -> str:
    """Return the UID of the object's controller if it has this kind and name, else an empty string."""
    for owner in metadata.get("ownerReferences", ()):
        if owner.get("controller"):
            is_expected = owner.get("kind") == kind and owner.get("name") == name
            return _share_uid(owner["uid"]) if is_expected and len(owner["uid"]) <= _MAX_UID_LENGTH else ""
    return ""


@lru_cache(maxsize=4096)
def _share_uid(uid: str) -> str:
    """Return one string for equal UIDs, which all pods of a Job then share. Interned strings would never be freed."""
    return uid


def _find_container_state(status: Mapping[str, Any]) -> Mapping[str, Any]:
    for container in status.get("containerStatuses", []):
        if container["name"] == names.CONTAINER:
            state: Mapping[str, Any] = container.get("state", {})
            return state
    return {}


def _parse_terminated(state: Mapping[str, Any] | None) -> Terminated | None:
    if state is None:
        return None
    return build_terminated(
        exit_code=state.get("exitCode", -1),
        reason=state.get("reason", "")[:_MAX_WORD_LENGTH],
        message=state.get("message", ""),
        finished=parse_time(state.get("finishedAt")),
    )


def _format_condition(condition: Mapping[str, Any]) -> str:
    text = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    return clean_line(text, MAX_MESSAGE_LENGTH)


def _format_unscheduled(condition: Mapping[str, Any]) -> str:
    return clean_line(condition.get("message") or condition.get("reason", ""), MAX_MESSAGE_LENGTH)
