"""What ended an attempt, decided from the evidence of all its pods; never from the Job's condition.

One dead rank takes its neighbours down, so most pods of a failed attempt tell of another's death. Precedence: a
rank's own final code, then a pod that was taken away, then memory, then any other code, then a lost peer.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sailvl_operator.api.status import Cause
from sailvl_operator.core.observe import INVALID_CONFIG_REASONS, PodRecord
from sailvl_trainer.contract import ExitCode, Result, Termination

_CAUSE_OF_CODE: dict[int, Cause] = {
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

GRACE_SLACK = 10.0
"""Seconds: a pod is deleted a moment after it is marked for eviction, and its end is told a moment after its grace."""
CONFIG_PATIENCE = {"CreateContainerConfigError": 60.0}
"""Seconds for which a container may wait so: a Secret may come a moment later, or be unreadable for one."""

_START_ERRORS = frozenset({"StartError", "ContainerCannotRun"})
"""Reasons of a container that never ran; its exit code is the runtime's, mostly 128."""
_WRONG_COMMAND = re.compile(r'exec: "[^"]*":.*(executable file not found|no such file or directory|permission denied)')
"""The runtime's words for a command that the image doesn't have. Hooks and mounts of a broken machine say such
things of other files."""
_MACHINE_WORDS = ("cuda error", "cuda driver", "hip error", "nccl", "ecc error", "nvlink", "input/output error")
"""In a crash's own words: the machine may be to blame, not the program."""

_PRECEDENCE = (
    Cause.CONFIG,
    Cause.DATA,
    Cause.NON_FINITE,
    Cause.STALLED,
    Cause.INFRA,
    Cause.OUT_OF_MEMORY,
    Cause.CRASH,
    Cause.PREEMPTED,
)
"""The first cause that any pod shows is the attempt's; a lost peer comes after all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one pod says of its end."""

    cause: Cause
    is_peer_lost: bool
    """It only tells that another is gone."""
    pod: PodRecord
    exit_code: int | None
    rank: int | None
    message: str
    traceback: str
    at: float
    """Unix seconds, by its node's clock; 0: not known."""
    seen: float
    """Unix seconds, by ours, at which it was first seen."""
    patience: float = 0.0
    """Seconds for which it has to last before it counts."""
    superseded_by: int = 0
    """The attempt that has cut this one off; 0: none has."""
    ranks_started: bool = True
    """Whether it had started a rank."""


def decode_termination(pod: PodRecord) -> Termination | None:
    """The worker's own words, if its message is whole."""
    if pod.terminated is None or not pod.terminated.message:
        return None
    try:
        return msgspec.json.decode(pod.terminated.message, type=Termination)
    except msgspec.MsgspecError:
        return None


def find_result(pods: Sequence[PodRecord]) -> Result | None:
    """The stage's result, from the message of any worker that has it."""
    messages = (decode_termination(pod) for pod in pods)
    return next((m.result for m in messages if m is not None and m.result is not None), None)


def has_succeeded(pods: Sequence[PodRecord], nodes: int) -> bool:
    """Whether every index has a pod that ended with 0."""
    done = {pod.index for pod in pods if pod.terminated is not None and pod.terminated.exit_code == 0}
    return len(done) == nodes


def was_saved(pods: Sequence[PodRecord]) -> bool:
    """Whether workers that were told to stop saved a checkpoint: all or none of them do."""
    return any(pod.terminated is not None and pod.terminated.exit_code == ExitCode.PREEMPTED for pod in pods)


def collect_evidence(pods: Sequence[PodRecord], *, was_running: bool) -> list[Evidence]:
    """The evidence of every pod that ended, vanished or went silent; `was_running`: all had been ready before.

    One that is deleted while its index keeps another is none: a Job controller whose answer was lost makes a pod twice,
    and takes one of the two away again.
    """
    kept = {pod.index for pod in pods if not _is_leaving(pod)}
    found = [_evidence(pod, was_running) for pod in pods if pod.index not in kept or not _is_leaving(pod)]
    return [evidence for evidence in found if evidence is not None]


def diagnose(evidence: Sequence[Evidence]) -> Evidence:
    """The one to blame; of equals the earliest."""
    return min(evidence, key=lambda e: (e.is_peer_lost, _PRECEDENCE.index(e.cause), e.at or float("inf")))


def find_silent(evidence: Sequence[Evidence], pods: Sequence[PodRecord]) -> PodRecord | None:
    """Where all that told anything have only lost another worker: the one that told nothing. None: somebody told more,
    or several are silent, or none is."""
    heard = {e.pod.index for e in evidence}
    silent = {pod.index: pod for pod in pods if pod.index not in heard and pod.terminated is None and not pod.is_gone}
    is_unknown = all(e.is_peer_lost for e in evidence)
    return next(iter(silent.values())) if is_unknown and len(silent) == 1 else None


def is_node_suspect(blamed: Evidence, evidence: Sequence[Evidence]) -> bool:
    """Whether the machine of the worker to blame may be at fault: not where the program says what failed in it, nor
    where several workers report a hang, which is of all of them."""
    match blamed.cause:
        case Cause.INFRA:
            return not blamed.is_peer_lost
        case Cause.STALLED:
            return blamed.ranks_started and sum(e.cause is Cause.STALLED for e in evidence) == 1
        case Cause.CRASH if _never_ran(blamed.pod):
            return True
        case Cause.CRASH:
            words = f"{blamed.message}\n{blamed.traceback}".lower()
            return (blamed.exit_code or 0) > 128 or any(part in words for part in _MACHINE_WORDS)
    return False


def _never_ran(pod: PodRecord) -> bool:
    return pod.terminated is not None and pod.terminated.reason in _START_ERRORS


def _is_leaving(pod: PodRecord) -> bool:
    return pod.is_deleting or pod.is_gone


def _evidence(pod: PodRecord, was_running: bool) -> Evidence | None:
    if pod.disrupted or (pod.is_gone and (pod.terminated is None or pod.terminated.exit_code != 0)):
        return _taken_away(pod)
    if pod.terminated is not None:
        return None if pod.terminated.exit_code == 0 else _exited(pod)
    if pod.waiting_reason in INVALID_CONFIG_REASONS:
        words = f"{pod.waiting_reason}: {pod.waiting_message}"
        return _of(pod, Cause.CONFIG, words, patience=CONFIG_PATIENCE.get(pod.waiting_reason, 0.0))
    if was_running and pod.phase == "Running" and not pod.is_ready:
        return _of(pod, Cause.INFRA, f"node {pod.node} is unreachable")
    if pod.phase == "Failed":
        return _of(pod, Cause.INFRA, "the pod failed without a word of its container")
    return None


def _taken_away(pod: PodRecord) -> Evidence:
    """Deleted, evicted, or its node lost. A worker that saved in time was preempted; its own fault stays its own."""
    if pod.terminated is not None:
        own = _exited(pod)
        if not own.is_peer_lost and own.cause is not Cause.CRASH:
            return own
    words = pod.disrupted or f"pod {pod.name} was removed from outside"
    return _of(pod, Cause.INFRA, words, patience=_remaining_grace(pod))


def _remaining_grace(pod: PodRecord) -> float:
    """Seconds for which one that is evicted from a living node may still save, counted from the first sign of it."""
    is_saving = pod.is_ready and not pod.is_gone and pod.terminated is None
    return max(GRACE_SLACK, pod.delete_by + GRACE_SLACK - pod.ended_seen) if is_saving else 0.0


def _exited(pod: PodRecord) -> Evidence:
    assert pod.terminated is not None
    code, said = pod.terminated.exit_code, decode_termination(pod)
    cause = _CAUSE_OF_CODE.get(code, Cause.CRASH)
    if pod.terminated.reason == "OOMKilled":
        cause = Cause.OUT_OF_MEMORY
    elif _never_ran(pod) and _WRONG_COMMAND.search(pod.terminated.message):
        cause = Cause.CONFIG
    log = "" if said is not None else pod.terminated.message.strip()
    return _of(
        pod,
        cause,
        (said.message if said is not None else "") or _tell_end(code, log),
        exit_code=code,
        rank=None if said is None else said.rank,
        is_peer_lost=code == ExitCode.PEER_LOST,
        traceback=log if said is None else said.traceback,
        superseded_by=0 if said is None else said.superseded_by,
        ranks_started=said is None or said.ranks_started,
    )


def _tell_end(code: int, log: str) -> str:
    """How a worker ended that had no time for words of its own; the kubelet gave its log's tail instead."""
    try:
        end = f"ended by {signal.Signals(code - 128).name} (exit code {code})"
    except ValueError:
        end = f"exit code {code}"
    return f"{end}; the last it said: {log.splitlines()[-1]}" if log else end


def _of(
    pod: PodRecord,
    cause: Cause,
    message: str,
    *,
    exit_code: int | None = None,
    rank: int | None = None,
    is_peer_lost: bool = False,
    traceback: str = "",
    patience: float = 0.0,
    superseded_by: int = 0,
    ranks_started: bool = True,
) -> Evidence:
    at = pod.terminated.finished if pod.terminated is not None else 0.0
    return Evidence(
        cause=cause,
        is_peer_lost=is_peer_lost,
        pod=pod,
        exit_code=exit_code,
        rank=rank,
        message=message[:1000],
        traceback=traceback[-2000:],
        at=at,
        seen=pod.ended_seen or at,
        patience=patience,
        superseded_by=superseded_by,
        ranks_started=ranks_started,
    )
