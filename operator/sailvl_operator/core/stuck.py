"""Why an attempt's pods don't run, in the words of who holds them back."""

from __future__ import annotations

from collections.abc import Sequence

from sailvl_operator.api.status import Reason
from sailvl_operator.core.observe import PodRecord

_REASON_OF_WAIT = {
    "ErrImagePull": Reason.IMAGE,
    "ImagePullBackOff": Reason.IMAGE,
    "InvalidImageName": Reason.IMAGE,
    "ErrImageNeverPull": Reason.IMAGE,
    "CreateContainerConfigError": Reason.CONTAINER_CONFIG,
    "CreateContainerError": Reason.CONTAINER_CONFIG,
    "RunContainerError": Reason.CONTAINER_CONFIG,
}


def find_stuck(pods: Sequence[PodRecord]) -> tuple[Reason, str] | None:
    """Reason and message of the first pod that can't start; None: no pod says so."""
    for pod in pods:
        if pod.is_gone or pod.is_deleting:
            continue
        if pod.unschedulable:
            reason = Reason.VOLUME if "persistentvolumeclaim" in pod.unschedulable.lower() else Reason.UNSCHEDULABLE
            return reason, f"pod {pod.name}: {pod.unschedulable}"
        if pod.waiting_reason in _REASON_OF_WAIT:
            return _REASON_OF_WAIT[pod.waiting_reason], f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
    return None
