"""Advance every stage of a run by its policies, in the order of the spec.

The status is the memory: actions follow from the status as it was last written, and the number of a later attempt is
written before its Job is created. After a crash between any two writes, the next reconcile decides the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from sailvl_operator.core.gates import GateResult, evaluate_gate
from sailvl_operator.core.lifecycle import (
    complete_stage,
    create_job,
    enforce_start_timeout,
    has_started,
    mark_running,
    replace_outdated_job,
    restart_after_alteration,
    restart_after_lost_job,
    restart_after_missing_pod,
    start_stage,
)
from sailvl_operator.core.restart_policy import describe_failure, restart_failed
from sailvl_operator.core.restart_request import restart_on_request
from sailvl_operator.core.stage_view import ACTIVE, StageTransition, StageView, with_status
from sailvl_operator.core.suspend import requeue_preempted, resume_stage, suspend_stage

POLICIES: tuple[Callable[[StageView], StageTransition | None], ...] = (
    replace_outdated_job,
    complete_stage,
    restart_after_alteration,
    suspend_stage,
    resume_stage,
    requeue_preempted,
    create_job,
    restart_failed,
    restart_after_missing_pod,
    mark_running,
    enforce_start_timeout,
    restart_after_lost_job,
)
"""Policies of an active stage: the first that returns a transition decides."""


def advance_stages(
    views: Sequence[StageView], *, request: str, is_suspended: bool
) -> tuple[tuple[StageTransition, ...], tuple[GateResult, ...]]:
    """Return the transitions of all stages and the results of the gates of those that have succeeded.

    A stage may start once the stages that it depends on have succeeded, their gates are open, and no stage before it
    has failed. `request` names a stage to restart, and `is_suspended` says that no stage may start.
    """
    transitions: list[StageTransition] = []
    gate_results: list[GateResult] = []
    done: set[str] = set()
    may_start = not is_suspended
    for view in views:
        is_ready = may_start and done.issuperset(view.planned.depends_on)
        transition = _advance_stage(view, may_start=is_ready, is_requested=request == view.status.name)
        gate_result = None
        if transition.status.state == "Succeeded":
            gate_result = evaluate_gate(view.planned.stage, transition.status.metrics)
        if view.status.state == "Succeeded" and (gate_result is None or gate_result.is_open):
            done.add(view.status.name)
        may_start = may_start and transition.status.state != "Failed"
        shown = None if gate_result is None else gate_result.to_status()
        transitions.append(replace(transition, status=msgspec.structs.replace(transition.status, gate_result=shown)))
        gate_results += [] if gate_result is None else [gate_result]
    return tuple(transitions), tuple(gate_results)


def _advance_stage(view: StageView, *, may_start: bool, is_requested: bool = False) -> StageTransition:
    """Return the transition of one stage; `is_requested` says that the user asks to restart it."""
    if is_requested and (transition := restart_on_request(view)):
        return transition
    if view.status.state == "Failed":
        return StageTransition(view=view, status=view.status, failure=describe_failure(view.status))
    if view.status.state == "Pending" and (may_start or has_started(view)):
        return _start_stage(view)
    if view.status.state not in ACTIVE:
        return StageTransition(view=view, status=view.status)
    decisions = (policy(view) for policy in POLICIES)
    return next((d for d in decisions if d is not None), StageTransition(view=view, status=view.latest))


def _start_stage(view: StageView) -> StageTransition:
    """Start a stage; if its workers run already, write their start and their running state at once."""
    started = start_stage(view)
    if started.should_start:
        return started
    advanced = _advance_stage(with_status(view, started.status), may_start=True)
    if advanced.status.state != "Running":
        return started
    return replace(advanced, view=view, events=started.events + advanced.events)
