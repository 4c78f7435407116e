"""Build the run's next status from the transitions of its stages: its conditions, and its columns of `kubectl get`.

Conditions follow the Kubernetes API conventions. Succeeded and Failed are final until the run is resumed; every
condition that isn't true carries the reason of the run's present state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import msgspec

from sailvl_operator.api.status import Condition, ConditionType, Reason, StageStatus, Status, Summary
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import clean_line
from sailvl_operator.core.gates import GateResult
from sailvl_operator.core.restart_request import MAX_REQUEST_LENGTH
from sailvl_operator.core.stage_view import ACTIVE, StageTransition
from sailvl_operator.core.stuck import Stuck
from sailvl_operator.core.units import format_duration, format_time, parse_time


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTransition:
    """The transitions of all stages, and what they mean for the run."""

    stages: tuple[StageTransition, ...]
    """One transition for each stage in the order of the spec."""
    gate_results: tuple[GateResult, ...] = ()
    """Results of the gates of all stages that have succeeded."""
    active_seconds_left: float = inf
    """Seconds for which the run may still be active."""

    @property
    def failure(self) -> tuple[Reason, str] | None:
        """Reason and message of the run's failure; None if it doesn't fail."""
        if stage_failure := next((stage.failure for stage in self.stages if stage.failure), ""):
            return Reason.STAGE_FAILED, stage_failure
        if self.active_seconds_left <= 0:
            return Reason.DEADLINE_EXCEEDED, "the run was active for activeDeadlineSeconds; raise it to resume the run"
        failed = (r for r in self.gate_results if not r.is_passed and r.on_fail == "Stop")
        return next(((Reason.GATE_FAILED, f"stage {r.stage}: {r.message}") for r in failed), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionValue:
    """Wanted status, reason and message of a condition."""

    is_true: bool
    reason: Reason
    message: str = ""


ConditionValues = dict[ConditionType, ConditionValue]


def build_status(run: Run, old: Status, transition: RunTransition, stuck: Stuck | None, *, now: float) -> Status:
    """Build the run's next status, except for goodput, which is accounted only if the status is written."""
    values = _evaluate_run(run, transition, stuck) | _evaluate_gates(transition)
    is_finished = values[ConditionType.SUCCEEDED].is_true or values[ConditionType.FAILED].is_true
    headline = values[ConditionType.STUCK if values[ConditionType.STUCK].is_true else ConditionType.RUNNING]
    return Status(
        observed_generation=run.generation,
        start_time=old.start_time or format_time(now),
        completion_time=(old.completion_time or format_time(now)) if is_finished else "",
        conditions=build_conditions(old, values, generation=run.generation, now=now),
        summary=build_summary(transition.stages, reason=headline.reason, goodput=old.summary.goodput),
        stages=[stage.status for stage in transition.stages],
        goodput=old.goodput,
        observed_restart_request=run.restart_stage[:MAX_REQUEST_LENGTH],
    )


def find_deferral(old: Status, new: Status, *, interval: float, now: float) -> float | None:
    """Return the Unix seconds until which the write may wait; None if it is due or there is nothing to write.

    It may wait if nothing but progress and the number of ready workers has changed. Every write costs the API server
    and etcd, and with many runs together the progress would dominate both. `interval` is the minimum number of seconds
    between two such writes.
    """
    if new == old or _drop_continuous_fields(old) != _drop_continuous_fields(new):
        return None
    due = parse_time(old.goodput.settled_at) + interval
    return due if due > now else None


def build_conditions(old: Status, values: ConditionValues, *, generation: int, now: float) -> list[Condition]:
    """Build all conditions in a fixed order; a transition time moves only if True becomes False or the reverse."""
    conditions = []
    for type_, value in values.items():
        known, status = old.condition(type_), "True" if value.is_true else "False"
        is_same = known is not None and known.status == status
        conditions.append(
            Condition(
                type=type_,
                status="True" if value.is_true else "False",
                reason=value.reason,
                message=clean_line(value.message, 1024),
                last_transition_time=known.last_transition_time if known is not None and is_same else format_time(now),
                observed_generation=generation,
            )
        )
    return conditions


def build_values(
    reason: Reason,
    message: str,
    *,
    succeeded: bool = False,
    failed: bool = False,
    running: bool = False,
    suspended: bool = False,
    stuck: Stuck | None = None,
) -> ConditionValues:
    """Build the values of the conditions that every run has."""
    return {
        ConditionType.SUCCEEDED: ConditionValue(is_true=succeeded, reason=reason, message=message),
        ConditionType.FAILED: ConditionValue(is_true=failed, reason=reason, message=message),
        ConditionType.RUNNING: ConditionValue(is_true=running, reason=reason, message=message),
        ConditionType.SUSPENDED: ConditionValue(is_true=suspended, reason=reason, message=message),
        ConditionType.STUCK: ConditionValue(is_true=True, reason=stuck[0], message=stuck[1])
        if stuck
        else ConditionValue(is_true=False, reason=Reason.NOT_STUCK),
    }


def build_summary(transitions: Sequence[StageTransition], *, reason: str, goodput: str) -> Summary:
    """Build `status.summary` from the stage that currently matters most and the workers of all active stages."""
    stages = [transition.status for transition in transitions]
    position, current = _find_current_stage(stages)
    progress = current.progress
    is_active = current.state not in ("Succeeded", "Failed")
    percent = 0 if progress is None or not progress.steps else min(100, 100 * progress.step // progress.steps)
    eta = progress.eta_seconds if progress is not None and is_active else None
    return Summary(
        stage=f"{current.name} ({position}/{len(stages)})",
        progress=f"{100 if current.state == 'Succeeded' else percent}%",
        ready=_format_ready_workers(transitions),
        restarts=sum(sum(stage.restarts.values()) for stage in stages),
        goodput=goodput,
        eta="" if eta is None else format_duration(eta),
        reason=reason,
    )


def _evaluate_run(run: Run, transition: RunTransition, stuck: Stuck | None) -> ConditionValues:
    states = {stage.status.state for stage in transition.stages}
    if transition.failure is not None:
        reason, message = transition.failure
        return build_values(reason, message, failed=True)
    if states == {"Succeeded"} and all(result.is_open for result in transition.gate_results):
        return build_values(Reason.COMPLETED, f"all {len(transition.stages)} stages succeeded", succeeded=True)
    if run.spec.suspend:
        is_idle = not states & {"Starting", "Running", "Restarting"}
        message = "spec.suspend is true" if is_idle else "the workers save a checkpoint"
        return build_values(Reason.SUSPENDED, message, suspended=is_idle)
    active = [_describe_stage(stage) for stage in transition.stages if stage.status.state in ACTIVE]
    reason = Reason.RUNNING if "Running" in states else Reason.RESTARTING if "Restarting" in states else Reason.STARTING
    return build_values(reason, ", ".join(active), running="Running" in states, stuck=stuck)


def _describe_stage(transition: StageTransition) -> str:
    status, error = transition.status, transition.view.attempt.progress_error
    description = f"{status.name} is {status.state.lower()}"
    if status.state != "Running" or not error:
        return description
    advice = "check NetworkPolicies between the operator and the workers"
    return f"{description}, but its progress can't be read ({error}); {advice}"


def _evaluate_gates(transition: RunTransition) -> ConditionValues:
    """Return the value of GatesPassed; the condition exists only once a stage with a gate has succeeded."""
    results = transition.gate_results
    if not results:
        return {}
    failed = [f"stage {r.stage}: {r.message}" for r in results if not r.is_passed]
    reason = Reason.GATE_FAILED if failed else Reason.GATE_PASSED
    message = "; ".join(failed) or f"{len(results)} of {len(results)} passed"
    return {ConditionType.GATES_PASSED: ConditionValue(is_true=not failed, reason=reason, message=message)}


def _find_current_stage(stages: Sequence[StageStatus]) -> tuple[int, StageStatus]:
    """Return the first failed stage, else the first active one, else the last that succeeded, else the first.

    The first item is the stage's position, from 1.
    """
    by_urgency = [
        [(i, s) for i, s in enumerate(stages, 1) if s.state == "Failed"],
        [(i, s) for i, s in enumerate(stages, 1) if s.state not in ("Failed", "Pending", "Succeeded")],
        [(i, s) for i, s in reversed(list(enumerate(stages, 1))) if s.state == "Succeeded"],
        [(1, stages[0])],
    ]
    return next(group[0] for group in by_urgency if group)


def _format_ready_workers(transitions: Sequence[StageTransition]) -> str:
    """Format ready and wanted workers of the active stages, as in "3/4"; empty if no stage is active."""
    views = [transition.view for transition in transitions if transition.status.state in ACTIVE]
    ready = sum(pod.is_ready and not pod.is_gone for view in views for pod in view.attempt.pods)
    return f"{ready}/{sum(view.nodes for view in views)}" if views else ""


def _drop_continuous_fields(status: Status) -> Status:
    """Drop the fields that change continuously: progress, ETA, ready workers and metrics.

    A new checkpoint still counts as a change, and so does the moment in which all workers are ready.
    """
    summary = msgspec.structs.replace(status.summary, progress="", eta="", ready="")
    return msgspec.structs.replace(status, summary=summary, stages=[_drop_progress(stage) for stage in status.stages])


def _drop_progress(stage: StageStatus) -> StageStatus:
    return msgspec.structs.replace(stage, progress=None, metrics={}) if stage.state == "Running" else stage
