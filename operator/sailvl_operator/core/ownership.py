"""Decide which objects in a run's namespace are the run's own.

Labels select what the operator watches, but anyone with write access to a namespace can set labels, create objects or
edit those of a run. A name and a UID never change. An object therefore counts only if its name is the one that the
operator computes, and its controller is the run, or for pods one of the run's Jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sailvl_operator.api import names
from sailvl_operator.api.status import decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.api.workers import MAX_NODES
from sailvl_operator.core.observe import JobRecord, NetworkPolicyRecord, NetworkPolicyState, PodRecord, ServiceRecord
from sailvl_operator.core.plan import PlannedStage

_GENERATED_PREFIX_LENGTH = 58
"""Letters of a pod's name before its random suffix. To keep within it, the Job controller cuts off the end of the Job's
name, not the index behind it."""


def split_job_name(name: str, run: str) -> tuple[str, int]:
    """Return stage and attempt from the name of a run's Job; an empty stage and 0 if it isn't the name of one."""
    prefix, _, number = name.rpartition("-")
    stage = prefix.removeprefix(f"{run}-")
    is_valid = number.isdecimal() and name == names.job_name(run, stage, int(number))
    return (stage, int(number)) if is_valid else ("", 0)


def describe_shape(mode: str, completions: int | None, parallelism: int | None) -> str:
    """Return how the shape of a Job differs from that of every Job that the operator creates; empty if it doesn't."""
    if mode != "Indexed":
        return f"completionMode is {mode or 'NonIndexed'}, not Indexed"
    if completions != parallelism:
        return f"completions is {completions} and parallelism {parallelism}, which must be equal"
    if completions is None or not 1 <= completions <= MAX_NODES:
        return f"completions is {completions}, not between 1 and {MAX_NODES}"
    return ""


def has_indexed_name(pod: str, job: str, index: int) -> bool:
    """Return whether a pod has the name that an Indexed Job gives to its pod with this index."""
    suffix = f"-{index}-"
    return pod.startswith(job[: _GENERATED_PREFIX_LENGTH - len(suffix)] + suffix)


def is_own_job(run: Run, job: JobRecord) -> bool:
    """Return whether a Job is one of the run's attempts, even if it was altered since."""
    return job.owner_uid == run.uid and job.run == run.name and job.attempt > 0


def is_own_service(run: Run, service: ServiceRecord) -> bool:
    """Return whether a Service is the one that the operator creates for the run."""
    return service.owner_uid == run.uid and service.name == names.service_name(run.name)


def find_policy_state(run: Run, policies: Iterable[NetworkPolicyRecord]) -> NetworkPolicyState:
    """Return the state of the NetworkPolicy that the operator creates for the run."""
    for policy in policies:
        if policy.owner_uid == run.uid and policy.name == names.network_policy_name(run.name):
            return "Current" if policy.is_current else "Outdated"
    return "Missing"


def select_pods(run: Run, jobs: Sequence[JobRecord], pods: Iterable[PodRecord]) -> Iterator[PodRecord]:
    """Yield the pods that belong to the run's Jobs.

    `jobs` are all known Jobs with the run's label, those of others included. The watch of pods may be ahead of the
    watch of Jobs, so a pod also counts as long as nothing is known of its Job and its attempt has no other Job.
    """
    own = {job.uid: job for job in jobs if is_own_job(run, job)}
    others = {job.uid for job in jobs if job.uid not in own}
    attempts = {(job.stage, job.attempt) for job in own.values()}
    for pod in pods:
        attempt, job = (pod.stage, pod.attempt), own.get(pod.owner_uid)
        if job is not None:
            if attempt == (job.stage, job.attempt) and pod.index < job.nodes:
                yield pod
        elif pod.owner_uid and pod.owner_uid not in others and attempt not in attempts and pod.run_uid == run.uid:
            yield pod


def is_job_evidence(run: Run, planned: Sequence[PlannedStage], job: JobRecord) -> bool:
    """Return whether a decision may depend on the last state of this deleted Job: it is the run's own, and of the
    current attempt of a stage or of the one before."""
    return is_own_job(run, job) and _is_recent(run, planned, job.stage, job.attempt)


def is_pod_evidence(run: Run, planned: Sequence[PlannedStage], jobs: Sequence[JobRecord], pod: PodRecord) -> bool:
    """Return whether a decision may depend on the last state of this deleted pod: it belongs to such a Job, and has an
    index that the plan has. `jobs` are all known Jobs with the run's label."""
    nodes = next((stage.nodes for stage in planned if stage.stage.name == pod.stage), MAX_NODES)
    is_own = pod.index < nodes and any(select_pods(run, jobs, [pod]))
    return is_own and _is_recent(run, planned, pod.stage, pod.attempt)


def _is_recent(run: Run, planned: Sequence[PlannedStage], stage: str, attempt: int) -> bool:
    """Return whether an attempt is the current one of a stage or the one before, whose workers may still be deleted.

    The number of the first attempt is written to the status only after its Job was created.
    """
    try:
        current = {status.name: status.attempt for status in decode_status(run.status).stages}
    except DocumentError:
        return False  # nothing is decided until the status can be read
    is_known = stage in current or any(p.stage.name == stage for p in planned)
    newest = max(1, current.get(stage, 0))
    return is_known and newest - 1 <= attempt <= newest
