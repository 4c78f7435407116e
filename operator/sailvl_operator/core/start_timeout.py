"""Enforce `restartPolicy.startTimeoutSeconds`: all workers of an attempt must run at the same time within it."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from sailvl_operator.api.types import RestartPolicy
from sailvl_operator.core.restart_policy import restart_after_infra_failure
from sailvl_operator.core.stage_view import StageTransition, StageView
from sailvl_operator.core.stuck import UNSCHEDULED_GRACE_SECONDS, is_recently_unscheduled


def restart_after_missing_pod(view: StageView) -> StageTransition | None:
    """Fail the attempt if a pod vanished without a terminal state.

    Before all pods have run, allow for late pods until the start timeout, even if one already succeeded: a worker that
    finds an existing result exits without waiting for its peers.
    """
    missing = sorted(set(range(view.nodes)) - {pod.index for pod in view.attempt.pods})
    ends = [pod.ended_seen for pod in view.attempt.pods if pod.terminated is not None]
    if not missing or not (ends or view.status.state == "Running"):
        return None
    deadline = min(ends, default=0.0) + view.defaults.failure_settle_seconds
    if view.attempt.job is not None:
        timeout = view.run.spec.restart_policy.start_timeout_seconds or RestartPolicy().start_timeout_seconds
        deadline = max(deadline, view.attempt.job.started + timeout)
    if view.status.state != "Running" and deadline > view.now:
        return StageTransition(view=view, status=view.latest, requeue_at=deadline)
    return restart_after_infra_failure(view, f"pod {missing[0]} was deleted externally")


def enforce_start_timeout(view: StageView) -> StageTransition | None:
    """Restart an attempt whose pods don't all run in time, so that they release their nodes.

    All nodes may be used again by the next attempt, because the excluded ones may be the only ones that have room.
    """
    job = view.attempt.job
    if view.status.state == "Running" or job is None or job.is_suspended or not job.started:
        return None
    reports = [
        pod.created + UNSCHEDULED_GRACE_SECONDS for pod in view.attempt.pods if is_recently_unscheduled(pod, view.now)
    ]
    timeout = view.run.spec.restart_policy.start_timeout_seconds
    if not timeout or view.now < job.started + timeout:
        times = [job.started + timeout, *reports] if timeout else reports
        return StageTransition(view=view, status=view.latest, requeue_at=min(times, default=None))
    if any(pod.terminated is not None for pod in view.attempt.pods):
        return None
    ready = sum(pod.is_ready for pod in view.attempt.pods)
    message = f"{ready} of {view.nodes} workers were ready within startTimeoutSeconds ({timeout})"
    transition = restart_after_infra_failure(view, message)
    return replace(transition, status=msgspec.structs.replace(transition.status, node_failures={}))
