"""Find out why an attempt failed, from the evidence of all its pods and never from the Job's condition.

One dead rank ends its peers too, so most pods of a failed attempt report a lost peer. The causes therefore have a
precedence: a rank's own final exit code first, then a disrupted pod, then memory, then any other exit code, and a lost
peer last. A cause is chosen only after the settling time, in which other pods may still end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sailvl_operator.api.status import Cause, LastFailure
from sailvl_operator.core.evidence import Evidence, collect_evidence, has_never_run
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.core.stage_view import StageView
from sailvl_operator.core.units import format_time
from sailvl_trainer.contract import WATCHDOG_INTERVAL_SECONDS

CAUSE_PRECEDENCE = (
    Cause.CONFIG,
    Cause.DATA,
    Cause.NON_FINITE,
    Cause.STALLED,
    Cause.INFRA,
    Cause.OUT_OF_MEMORY,
    Cause.CRASH,
    Cause.PREEMPTED,
)
"""The first cause for which any pod has evidence is the attempt's; a lost peer counts after all of them."""

_NODE_ERRORS = ("cuda error", "cuda driver", "hip error", "nccl", "ecc error", "nvlink", "input/output error")
"""Parts of a crash's message or traceback that point to the node instead of the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Why an attempt failed."""

    failure: LastFailure
    suspect_node: str = ""
    """Node that may have caused the failure; empty if none is suspected."""
    superseded_by: int = 0
    """Attempt that has claimed the stage and thereby ended this one; 0 if none has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Undecided:
    """There is evidence of a failure, but its cause can't be chosen yet."""

    until: float
    """Unix seconds at which the evidence has to be examined again."""


def diagnose_attempt(view: StageView) -> Diagnosis | Undecided | None:
    """Return why the current attempt failed, that this is undecided, or None if no pod has evidence of a failure."""
    found = collect_evidence(view.attempt.pods, was_running=view.status.state == "Running")
    if not found:
        return None
    evidence = [e for e in found if not e.min_seconds or e.seen + e.min_seconds <= view.now]
    if not evidence:
        return Undecided(until=min(e.seen + e.min_seconds for e in found))
    settled_at = min(e.seen for e in evidence) + view.defaults.failure_settle_seconds
    if any(e.cause is Cause.STALLED for e in evidence):  # the watchdogs of other workers may fire a bit later
        settled_at += WATCHDOG_INTERVAL_SECONDS
    if len(evidence) < view.nodes and settled_at > view.now:
        return Undecided(until=settled_at)
    root_cause = find_root_cause(evidence)
    if root_cause.reports_lost_peer:
        return _diagnose_lost_peer(view, root_cause, evidence)
    return Diagnosis(
        failure=LastFailure(
            cause=root_cause.cause,
            attempt=view.status.attempt,
            rank=root_cause.rank,
            node=root_cause.pod.node,
            exit_code=root_cause.exit_code,
            message=root_cause.message,
            traceback=root_cause.traceback,
            time=format_time(root_cause.at or view.now),
        ),
        suspect_node=root_cause.pod.node if is_node_suspect(root_cause, evidence) else "",
        superseded_by=max(e.superseded_by for e in evidence),
    )


def diagnose_infra_failure(view: StageView, message: str) -> Diagnosis:
    """Return the diagnosis of an attempt that failed without evidence of any pod."""
    return Diagnosis(
        failure=LastFailure(cause=Cause.INFRA, attempt=view.status.attempt, message=message, time=format_time(view.now))
    )


def find_root_cause(evidence: Sequence[Evidence]) -> Evidence:
    """Return the evidence with the first cause by precedence; among equal causes, the earliest."""
    return min(evidence, key=lambda e: (e.reports_lost_peer, CAUSE_PRECEDENCE.index(e.cause), e.at or float("inf")))


def find_silent_pod(evidence: Sequence[Evidence], pods: Sequence[PodRecord]) -> PodRecord | None:
    """If every worker that reported says only that it lost a peer, return the single worker that hasn't reported.

    It is the likely cause. Return None if another cause was reported, or if zero or several workers are silent.
    """
    reported = {e.pod.index for e in evidence}
    silent = {
        pod.index: pod for pod in pods if pod.index not in reported and pod.terminated is None and not pod.is_gone
    }
    is_unexplained = all(e.reports_lost_peer for e in evidence)
    return next(iter(silent.values())) if is_unexplained and len(silent) == 1 else None


def is_node_suspect(root_cause: Evidence, evidence: Sequence[Evidence]) -> bool:
    """Return whether the node of the root cause may be at fault.

    It isn't if the program reports an error of its own, or if several workers report a stall, because a stall of the
    collective concerns all of them.
    """
    match root_cause.cause:
        case Cause.INFRA:
            return not root_cause.reports_lost_peer
        case Cause.STALLED:
            return root_cause.ranks_started and sum(e.cause is Cause.STALLED for e in evidence) == 1
        case Cause.CRASH if has_never_run(root_cause.pod):
            return True
        case Cause.CRASH:
            text = f"{root_cause.message}\n{root_cause.traceback}".lower()
            return (root_cause.exit_code or 0) > 128 or any(part in text for part in _NODE_ERRORS)
    return False


def _diagnose_lost_peer(view: StageView, root_cause: Evidence, evidence: Sequence[Evidence]) -> Diagnosis:
    """Diagnose an attempt of which every worker reports a lost peer.

    A dead node reports nothing, and the API server marks it as unreachable much later, so the silent worker is named.
    """
    silent = find_silent_pod(evidence, view.attempt.pods)
    message = f"worker {root_cause.pod.index} (node {root_cause.pod.node}) reported: {root_cause.message}"
    if silent is not None:
        message = f"worker {silent.index} (node {silent.node}) stopped responding; {message}"
    node = "" if silent is None else silent.node
    return Diagnosis(
        failure=LastFailure(
            cause=root_cause.cause,
            attempt=view.status.attempt,
            node=node,
            exit_code=root_cause.exit_code if silent is None else None,
            message=message[:1000],
            traceback=root_cause.traceback,
            time=format_time(root_cause.at or view.now),
        ),
        suspect_node=node,
    )
