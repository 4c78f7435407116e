"""Why a stage doesn't run, in the words of who holds it back: scheduler, quota, image, volume, admission, queue,
gate."""

from __future__ import annotations

from collections.abc import Sequence

from sailvl_operator.api import names
from sailvl_operator.api.status import Reason
from sailvl_operator.core.gates import Ruling
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.core.stage_view import ACTIVE, View

Stuck = tuple[Reason, str]
"""Reason and message of the condition."""

PATIENCE_SECONDS = 5.0
"""For which a pod may have no node before that is worth a word."""

_REASON_OF_WAIT = {
    "ErrImagePull": Reason.IMAGE_PULL_FAILED,
    "ImagePullBackOff": Reason.IMAGE_PULL_FAILED,
    "InvalidImageName": Reason.IMAGE_PULL_FAILED,
    "ErrImageNeverPull": Reason.IMAGE_PULL_FAILED,
    "CreateContainerConfigError": Reason.CONTAINER_CONFIG_ERROR,
    "CreateContainerError": Reason.CONTAINER_CONFIG_ERROR,
    "RunContainerError": Reason.CONTAINER_CONFIG_ERROR,
}

_REASON_OF_WORDS = (
    ("exceeded quota", Reason.QUOTA),
    ("failed quota", Reason.QUOTA),
    ("waits for the scheduler", Reason.UNSCHEDULABLE),
    ("ImagePullBackOff", Reason.IMAGE_PULL_FAILED),
    ("ErrImagePull", Reason.IMAGE_PULL_FAILED),
    ("admission webhook", Reason.ADMISSION),
    ("failed calling webhook", Reason.ADMISSION),
    ("violates PodSecurity", Reason.ADMISSION),
    ("ValidatingAdmissionPolicy", Reason.ADMISSION),
    ("isn't this run's", Reason.NAME_CONFLICT),
    ("volume", Reason.VOLUME_NOT_READY),
    ("Volume", Reason.VOLUME_NOT_READY),
    ("is forbidden", Reason.FORBIDDEN),
)
"""The first that the words of a refusal hold; others: Rejected."""


def find_stuck(views: Sequence[View], rulings: Sequence[Ruling]) -> Stuck | None:
    """Of the first stage that is held back; None: none is."""
    waiting = (find_stuck_stage(view) for view in views if view.status.state in ACTIVE)
    found = next((stuck for stuck in waiting if stuck), None)
    return found or next((_of_gate(ruling) for ruling in rulings if not ruling.opens), None)


def find_stuck_stage(view: View) -> Stuck | None:
    """Of one stage that should run."""
    if view.status.state == "Suspended" or view.run.spec.suspend:
        return None
    refusal = _of_words(view, view.observed.get(*view.key).refusal)
    if view.status.state == "Running" or refusal:
        return refusal
    stuck_pod = _find_stuck_pod(view.pods, view.now)
    if stuck_pod is not None:
        reason, words = stuck_pod
        return reason, f"{words}; a mended spec is taken up by the next attempt: {_at_once(view)}"
    return _of_words(view, view.observed.get(*view.key).wait_reason) or _of_queue(view)


def _at_once(view: View) -> str:
    return f"annotate {names.ANNOTATION_RESTART}={view.status.name} to start it at once"


def is_patient(pod: PodRecord, now: float) -> bool:
    """Whether a pod without a node is so young that it may get one yet: dead workers' places become free."""
    return bool(pod.unschedulable) and now < pod.created + PATIENCE_SECONDS


def _find_stuck_pod(pods: Sequence[PodRecord], now: float) -> Stuck | None:
    """The first pod that can't start and says so itself."""
    for pod in pods:
        if pod.is_gone or pod.is_deleting or is_patient(pod, now):
            continue
        if pod.unschedulable:
            reason = (
                Reason.VOLUME_NOT_READY
                if "persistentvolumeclaim" in pod.unschedulable.lower()
                else Reason.UNSCHEDULABLE
            )
            return reason, f"pod {pod.name}: {pod.unschedulable}"
        if pod.waiting_reason in _REASON_OF_WAIT:
            return _REASON_OF_WAIT[pod.waiting_reason], f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
    return None


def _of_words(view: View, words: str) -> Stuck | None:
    """What the API server, a controller or a kubelet said of the attempt's Job, pods and Service."""
    if not words:
        return None
    if view.job is not None and view.job.is_suspended:
        return Reason.QUEUED, words
    return next((reason for part, reason in _REASON_OF_WORDS if part in words), Reason.REJECTED), words


def _of_queue(view: View) -> Stuck | None:
    if view.job is None or not view.job.is_suspended:
        return None
    if view.job.queue:
        return Reason.QUEUED, f"stage {view.status.name} waits in Kueue's queue {view.job.queue}"
    return Reason.QUEUED, f"Job {view.job.name} was suspended by another; it starts when whoever did that lets it go"


def _of_gate(ruling: Ruling) -> Stuck:
    advice = "raise the gate, or set its onFail to Continue, to go on"
    return Reason.GATE_NOT_PASSED, f"stage {ruling.stage}: {ruling.message}; {advice}"
