"""Decide what has to be done for a run: (run, observation, time) → decision, without I/O, clock or environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists, find_disallowed_fields
from sailvl_operator.api.parse import find_unsupported_fields
from sailvl_operator.api.status import StageStatus, Status, decode_status
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.core.conditions import RunTransition, build_status, find_deferral
from sailvl_operator.core.decision import Decision, NetworkPolicyAction
from sailvl_operator.core.events import collect_events
from sailvl_operator.core.finished import find_active_seconds_left, may_resume, reconcile_finished, reconcile_invalid
from sailvl_operator.core.goodput import update_goodput
from sailvl_operator.core.jobs import build_attempts, find_deletions
from sailvl_operator.core.observe import Observed
from sailvl_operator.core.plan import PlannedStage, plan
from sailvl_operator.core.restart_request import find_request, is_handled
from sailvl_operator.core.stage import advance_stages
from sailvl_operator.core.stage_view import ACTIVE, build_views
from sailvl_operator.core.stuck import find_stuck
from sailvl_operator.core.suspend import suspend_with_run


def reconcile(
    run: Run,
    observed: Observed,
    *,
    now: float,
    defaults: Defaults,
    allowed: AllowLists = ALLOW_ALL,
    planned: Sequence[PlannedStage] | None = None,
) -> Decision:
    """Return everything that has to be done for a run at `now` (Unix seconds).

    The decision repeats itself until it is executed. `allowed` are the installation's allow-lists; `planned` is the
    result of `plan(run)`, if the caller has it.
    """
    old = decode_status(run.status)
    # A run that is being deleted needs nothing: the garbage collector deletes its objects.
    if run.deleting:
        return Decision()
    # A finished run is cleaned up and kept for ttlSecondsAfterFinished, unless something has made it active again.
    if old.is_finished and not may_resume(run, old):
        return reconcile_finished(run, old, observed, now=now)
    # A spec with a field that isn't supported or allowed fails the run until the spec is fixed.
    if problems := find_unsupported_fields(run.spec) or find_disallowed_fields(run.spec, allowed, old.stages):
        decision = reconcile_invalid(run, "; ".join(map(": ".join, problems)), observed, now=now)
        return replace(decision, network_policy=_find_policy_action(run, old.stages, observed, defaults))

    # Advance every stage: restart requests, success, suspend, queues, failures and restarts, start timeouts, gates.
    views = build_views(run, planned or plan(run), old, observed, defaults=defaults, now=now)
    stages, gates = advance_stages(views, request=find_request(run, old), is_suspended=run.spec.suspend)

    # Find out what holds the run back: the scheduler, a quota, an image, a volume, a queue or a gate.
    stuck = find_stuck(views, gates)

    # The run fails if a stage or a gate does, or if it has been active for activeDeadlineSeconds.
    seconds_left = find_active_seconds_left(run, old, stages, now=now)
    transition = RunTransition(stages=stages, gate_results=gates, active_seconds_left=seconds_left)

    # If it fails, its other stages are suspended, so that they can resume with it.
    if transition.failure is not None:
        transition = replace(transition, stages=tuple(map(suspend_with_run, stages)))

    # Derive conditions and summary from the stages.
    new = build_status(run, old, transition, stuck, now=now)

    # Progress alone is written only now and then. Any status that is written has its goodput brought up to date.
    deferred_until = find_deferral(old, new, interval=defaults.progress_seconds, now=now)
    new = old if deferred_until is not None else update_goodput(run, old, new, transition.stages, now=now)

    # Decide on Jobs to delete, suspend and create, the Service, the NetworkPolicy, the restart annotation, the status
    # and its events.
    times = [deferred_until, now + seconds_left, *(stage.requeue_at for stage in transition.stages)]
    policy = _find_policy_action(run, new.stages, observed, defaults)
    requeue_at = _find_requeue_time(new, times)
    return _build_decision(run, old, new, transition, observed, network_policy=policy, requeue_at=requeue_at)


def _build_decision(
    run: Run,
    old: Status,
    new: Status,
    transition: RunTransition,
    observed: Observed,
    *,
    network_policy: NetworkPolicyAction | None,
    requeue_at: float | None,
) -> Decision:
    stages = transition.stages
    has_peers = any(stage.status.state in ACTIVE and stage.view.nodes > 1 for stage in stages)
    is_urgent = new.is_finished or any(_is_awaited(stage.view.status, stage.status) for stage in stages)
    return Decision(
        deletions=find_deletions(old.stages, stages, observed),
        suspend=tuple((s.view.attempt.job, s.suspend) for s in stages if s.suspend is not None and s.view.attempt.job),
        start=build_attempts(stages),
        ensure_service=has_peers and not observed.has_service,
        network_policy=network_policy,
        clear_restart_request=is_handled(run, old),
        status=None if new == old else new,
        is_urgent=is_urgent,
        events=collect_events(run, old, new, transition),
        requeue_at=requeue_at,
    )


def _find_policy_action(
    run: Run, stages: Iterable[StageStatus], observed: Observed, defaults: Defaults
) -> NetworkPolicyAction | None:
    """Return the change of the NetworkPolicy, which is created once a stage has workers and then kept up to date."""
    state = observed.network_policy
    if not defaults.network_policies or run.spec.network.policy == "Disabled":
        return None if state == "Missing" else NetworkPolicyAction.DELETE
    if state == "Outdated":
        return NetworkPolicyAction.UPDATE
    has_workers = state == "Missing" and any(stage.state in ACTIVE for stage in stages)
    return NetworkPolicyAction.CREATE if has_workers else None


def _find_requeue_time(new: Status, times: Iterable[float | None]) -> float | None:
    """Return the earliest of the times that are set and finite; None if the run has finished."""
    return min((time for time in times if time is not None and time < inf and not new.is_finished), default=None)


def _is_awaited(old: StageStatus, new: StageStatus) -> bool:
    """Return whether a write of the stage's status lets other work start: a later attempt, or the stages after it."""
    has_ended = new.state != old.state and new.state in ("Succeeded", "Failed")
    return has_ended or new.attempt > max(1, old.attempt)
