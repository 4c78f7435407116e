"""Find out what holds a run back: the scheduler, a quota, an image, a volume, admission, a queue or a gate.

The result is the Stuck condition; its reason shows the user where to act.
"""

from __future__ import annotations

from collections.abc import Sequence

from sailvl_operator.api import names
from sailvl_operator.api.status import Reason
from sailvl_operator.core.gates import GateResult
from sailvl_operator.core.observe import Obstacle, PodRecord
from sailvl_operator.core.stage_view import ACTIVE, StageView

Stuck = tuple[Reason, str]
"""Reason and message of the Stuck condition."""

UNSCHEDULED_GRACE_SECONDS = 5.0
"""Seconds for which a pod may have no node before the condition reports it."""

_REASON_BY_WAITING_REASON = {
    "ErrImagePull": Reason.IMAGE_PULL_FAILED,
    "ImagePullBackOff": Reason.IMAGE_PULL_FAILED,
    "InvalidImageName": Reason.IMAGE_PULL_FAILED,
    "ErrImageNeverPull": Reason.IMAGE_PULL_FAILED,
    "CreateContainerConfigError": Reason.CONTAINER_CONFIG_ERROR,
    "CreateContainerError": Reason.CONTAINER_CONFIG_ERROR,
    "RunContainerError": Reason.CONTAINER_CONFIG_ERROR,
}

_REASON_BY_TEXT = (
    ("exceeded quota", Reason.QUOTA),
    ("failed quota", Reason.QUOTA),
    ("ImagePullBackOff", Reason.IMAGE_PULL_FAILED),
    ("ErrImagePull", Reason.IMAGE_PULL_FAILED),
    ("admission webhook", Reason.ADMISSION),
    ("failed calling webhook", Reason.ADMISSION),
    ("violates PodSecurity", Reason.ADMISSION),
    ("ValidatingAdmissionPolicy", Reason.ADMISSION),
    ("volume", Reason.VOLUME_NOT_READY),
    ("Volume", Reason.VOLUME_NOT_READY),
    ("is forbidden", Reason.FORBIDDEN),
)
"""Reason by a part of a message of the API server, a controller or a kubelet, which have no codes for these. The first
match counts, and a message without a match is Rejected."""


def find_stuck(views: Sequence[StageView], gate_results: Sequence[GateResult]) -> Stuck | None:
    """Return what holds back the first stage that can't run, else the gate that isn't open; None if nothing does."""
    active = (_find_stuck_stage(view) for view in views if view.status.state in ACTIVE)
    if found := next((stuck for stuck in active if stuck), None):
        return found
    return next((_describe_gate(result) for result in gate_results if not result.is_open), None)


def is_recently_unscheduled(pod: PodRecord, now: float) -> bool:
    """Return whether a pod found no node only moments ago; it often gets one as soon as other pods are deleted."""
    return bool(pod.unschedulable) and now < pod.created + UNSCHEDULED_GRACE_SECONDS


def find_reason(obstacle: Obstacle) -> Reason:
    """Return the reason of an obstacle; if it has none, the one that fits its message."""
    if obstacle.reason is not None:
        return obstacle.reason
    return next((reason for part, reason in _REASON_BY_TEXT if part in obstacle.message), Reason.REJECTED)


def _find_stuck_stage(view: StageView) -> Stuck | None:
    if view.status.state == "Suspended" or view.run.spec.suspend:
        return None
    if view.attempt.refusal is not None:
        return _describe_obstacle(view, view.attempt.refusal)
    if view.status.state == "Running":
        return None
    if stuck_pod := _find_stuck_pod(view.attempt.pods, view.now):
        reason, message = stuck_pod
        annotation = f"{names.ANNOTATION_RESTART}={view.status.name}"
        advice = f"fix the spec; it applies to the next attempt. To start one now, annotate {annotation}"
        return reason, f"{message}; {advice}"
    if view.attempt.obstacle is not None:
        return _describe_obstacle(view, view.attempt.obstacle)
    return _describe_queue(view)


def _find_stuck_pod(pods: Sequence[PodRecord], now: float) -> Stuck | None:
    """Return reason and message of the first pod whose own status says why it can't start."""
    for pod in pods:
        if pod.is_gone or pod.is_deleting or is_recently_unscheduled(pod, now):
            continue
        if pod.unschedulable:
            is_volume = "persistentvolumeclaim" in pod.unschedulable.lower()
            reason = Reason.VOLUME_NOT_READY if is_volume else Reason.UNSCHEDULABLE
            return reason, f"pod {pod.name}: {pod.unschedulable}"
        if pod.waiting_reason in _REASON_BY_WAITING_REASON:
            message = f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
            return _REASON_BY_WAITING_REASON[pod.waiting_reason], message
    return None


def _describe_obstacle(view: StageView, obstacle: Obstacle) -> Stuck:
    is_queued = view.attempt.job is not None and view.attempt.job.is_suspended
    return Reason.QUEUED if is_queued else find_reason(obstacle), obstacle.message


def _describe_queue(view: StageView) -> Stuck | None:
    job = view.attempt.job
    if job is None or not job.is_suspended:
        return None
    if job.queue:
        return Reason.QUEUED, f"stage {view.status.name} waits in Kueue's queue {job.queue}"
    return Reason.QUEUED, f"Job {job.name} was suspended externally; it starts when its owner unsuspends it"


def _describe_gate(result: GateResult) -> Stuck:
    advice = "relax the gate's bound, or set onFail: Continue"
    return Reason.GATE_NOT_PASSED, f"stage {result.stage}: {result.message}; {advice}"
