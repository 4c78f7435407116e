"""Derive from one pod what it shows about the end of its attempt: its cause, exit code, rank and message.

`failure.py` chooses the cause of the attempt from the evidence of all its pods.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from sailvl_operator.api.status import Cause
from sailvl_operator.core.observe import INVALID_CONFIG_REASONS, PodRecord
from sailvl_operator.core.reports import MAX_MESSAGE_LENGTH
from sailvl_trainer.contract import ExitCode, Termination

CAUSE_BY_EXIT_CODE: dict[int, Cause] = {
    ExitCode.CONFIG: Cause.CONFIG,
    126: Cause.CONFIG,
    127: Cause.CONFIG,
    ExitCode.DATA: Cause.DATA,
    ExitCode.NON_FINITE: Cause.NON_FINITE,
    ExitCode.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    ExitCode.STALLED: Cause.STALLED,
    ExitCode.STORAGE: Cause.CRASH,
    ExitCode.PREEMPTED: Cause.PREEMPTED,
    ExitCode.TERMINATED: Cause.PREEMPTED,
    ExitCode.PEER_LOST: Cause.INFRA,
}
"""Cause by the exit code of the worker's container; any other code is a crash."""
GRACE_SLACK_SECONDS = 10.0
"""Seconds that an eviction may take before its grace period begins, and the report of the pod's end after it."""
CONFIG_ERROR_SECONDS = {"CreateContainerConfigError": 60.0}
"""Seconds for which a container may wait for this reason: a Secret may be created, or readable, a moment later."""

_START_ERRORS = frozenset({"StartError", "ContainerCannotRun"})
"""Reasons of a container that never ran; its exit code is the container runtime's, usually 128."""
_MISSING_COMMAND = re.compile(
    r'exec: "[^"]*":.*(executable file not found|no such file or directory|permission denied)'
)
"""Error of the container runtime if the image lacks the command. Hooks and mounts of a broken node report similar
errors about other files, so the pattern includes the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Cause, exit code and message that one pod shows about the end of its attempt."""

    cause: Cause
    pod: PodRecord
    message: str
    reports_lost_peer: bool = False
    """Whether the worker reports only that it lost another worker."""
    exit_code: int | None = None
    rank: int | None = None
    traceback: str = ""
    at: float = 0.0
    """End of the container in Unix seconds, by the clock of its node; 0 if unknown."""
    seen: float = 0.0
    """Unix seconds, by the operator's clock, at which the evidence was first observed."""
    min_seconds: float = 0.0
    """Seconds that the evidence must last before it counts."""
    superseded_by: int = 0
    """Attempt that has claimed the stage and thereby ended this one; 0 if none has."""
    ranks_started: bool = True
    """Whether the worker had started its ranks."""


def collect_evidence(pods: Sequence[PodRecord], *, was_running: bool) -> list[Evidence]:
    """Return the evidence of every pod that failed, disappeared or became unreachable.

    `was_running` says that all pods had been ready before. A deleted pod whose index has another pod is no evidence:
    a Job controller that missed an answer creates a pod twice and then deletes one of the two.
    """
    remaining = {pod.index for pod in pods if not _is_leaving(pod)}
    relevant = (pod for pod in pods if pod.index not in remaining or not _is_leaving(pod))
    found = (_examine_pod(pod, was_running) for pod in relevant)
    return [evidence for evidence in found if evidence is not None]


def was_checkpoint_saved(pods: Sequence[PodRecord]) -> bool:
    """Return whether workers that received SIGTERM saved a checkpoint; either all of them do or none."""
    return any(pod.terminated is not None and pod.terminated.exit_code == ExitCode.PREEMPTED for pod in pods)


def has_never_run(pod: PodRecord) -> bool:
    """Return whether the container runtime failed to start the worker's container."""
    return pod.terminated is not None and pod.terminated.reason in _START_ERRORS


def _is_leaving(pod: PodRecord) -> bool:
    return pod.is_deleting or pod.is_gone


def _examine_pod(pod: PodRecord, was_running: bool) -> Evidence | None:
    if pod.disrupted or (pod.is_gone and (pod.terminated is None or pod.terminated.exit_code != 0)):
        return _examine_disruption(pod)
    if pod.terminated is not None:
        return None if pod.terminated.exit_code == 0 else _examine_exit(pod)
    if pod.waiting_reason in INVALID_CONFIG_REASONS:
        message = f"{pod.waiting_reason}: {pod.waiting_message}"
        min_seconds = CONFIG_ERROR_SECONDS.get(pod.waiting_reason, 0.0)
        return _build_evidence(pod, Cause.CONFIG, message, min_seconds=min_seconds)
    if was_running and pod.phase == "Running" and not pod.is_ready:
        return _build_evidence(pod, Cause.INFRA, f"node {pod.node} is unreachable")
    if pod.phase == "Failed":
        return _build_evidence(pod, Cause.INFRA, "the pod failed without a container status")
    return None


def _examine_disruption(pod: PodRecord) -> Evidence:
    """Examine a pod that was deleted or evicted, or whose node was lost.

    Its exit code still counts if the worker saved a checkpoint in time or failed by itself.
    """
    if pod.terminated is not None:
        own = _examine_exit(pod)
        if not own.reports_lost_peer and own.cause is not Cause.CRASH:
            return own
    message = pod.disrupted or f"pod {pod.name} was deleted externally"
    return _build_evidence(pod, Cause.INFRA, message, min_seconds=_count_grace_seconds(pod))


def _count_grace_seconds(pod: PodRecord) -> float:
    """Return the seconds, from the first sign of an eviction, in which the worker may still save a checkpoint."""
    is_saving = pod.is_ready and not pod.is_gone and pod.terminated is None
    return max(GRACE_SLACK_SECONDS, pod.delete_by + GRACE_SLACK_SECONDS - pod.ended_seen) if is_saving else 0.0


def _examine_exit(pod: PodRecord) -> Evidence:
    assert pod.terminated is not None
    code, termination = pod.terminated.exit_code, pod.terminated.report
    cause = CAUSE_BY_EXIT_CODE.get(code, Cause.CRASH)
    if pod.terminated.reason == "OOMKilled":
        cause = Cause.OUT_OF_MEMORY
    elif has_never_run(pod) and _MISSING_COMMAND.search(pod.terminated.message):
        cause = Cause.CONFIG
    if termination is None:
        log = pod.terminated.message.strip()
        termination = Termination(exit_code=code, message=_describe_exit(code, log), traceback=log)
    return _build_evidence(
        pod, cause, termination.message or _describe_exit(code, ""), exit_code=code, termination=termination
    )


def _describe_exit(code: int, log: str) -> str:
    """Describe the exit of a worker that left no error report; `log` is the tail of its log, if the kubelet has it."""
    try:
        end = f"terminated by {signal.Signals(code - 128).name} (exit code {code})"
    except ValueError:
        end = f"exit code {code}"
    return f"{end}; last log line: {log.splitlines()[-1]}" if log else end


def _build_evidence(
    pod: PodRecord,
    cause: Cause,
    message: str,
    *,
    min_seconds: float = 0.0,
    exit_code: int | None = None,
    termination: Termination | None = None,
) -> Evidence:
    at = pod.terminated.finished if pod.terminated is not None else 0.0
    termination = termination or Termination(exit_code=0)
    return Evidence(
        cause=cause,
        pod=pod,
        message=message[:MAX_MESSAGE_LENGTH],
        reports_lost_peer=exit_code == ExitCode.PEER_LOST,
        exit_code=exit_code,
        rank=termination.rank,
        traceback=termination.traceback,
        at=at,
        seen=pod.ended_seen or at,
        min_seconds=min_seconds,
        superseded_by=termination.superseded_by,
        ranks_started=termination.ranks_started,
    )
