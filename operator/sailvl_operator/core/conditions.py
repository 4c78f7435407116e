"""The run as a whole, from the steps of its stages: its conditions, its headline, and whether it is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from sailvl_operator.api.status import ConditionType, Reason, StageStatus
from sailvl_operator.api.types import Run
from sailvl_operator.core.gates import Ruling
from sailvl_operator.core.stage_view import ACTIVE, Step, View
from sailvl_operator.core.stuck import Stuck, find_stuck
from sailvl_operator.core.summary import Verdict

Verdicts = dict[ConditionType, Verdict]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Where the run stands after all stages took their step."""

    views: tuple[View, ...]
    steps: tuple[Step, ...]
    rulings: tuple[Ruling, ...] = ()
    """Of the gates come to so far."""
    rest: float = inf
    """Seconds for which the run may be active yet."""

    @property
    def statuses(self) -> list[StageStatus]:
        return [step.status for step in self.steps]

    @property
    def failure(self) -> tuple[Reason, str] | None:
        """Why the run fails; None: it doesn't."""
        of_stage = next((step.failure for step in self.steps if step.failure), "")
        if of_stage:
            return Reason.STAGE_FAILED, of_stage
        if self.rest <= 0:
            return Reason.DEADLINE_EXCEEDED, "the run was active for activeDeadlineSeconds; raise them to go on"
        stops = (r for r in self.rulings if not r.is_passed and r.on_fail == "Stop")
        return next(((Reason.GATE_FAILED, f"stage {r.stage}: {r.message}") for r in stops), None)


def judge(run: Run, outcome: Outcome) -> Verdicts:
    """All conditions of a run."""
    return _judge_stages(run, outcome) | _judge_gates(outcome)


def build_verdicts(
    reason: Reason,
    message: str,
    *,
    succeeded: bool = False,
    failed: bool = False,
    running: bool = False,
    suspended: bool = False,
    stuck: Stuck | None = None,
) -> Verdicts:
    """The conditions that every run has; those that aren't true say why the run is where it is."""
    why_stuck = Verdict(is_true=True, reason=stuck[0], message=stuck[1]) if stuck else None
    return {
        ConditionType.SUCCEEDED: Verdict(is_true=succeeded, reason=reason, message=message),
        ConditionType.FAILED: Verdict(is_true=failed, reason=reason, message=message),
        ConditionType.RUNNING: Verdict(is_true=running, reason=reason, message=message),
        ConditionType.SUSPENDED: Verdict(is_true=suspended, reason=reason, message=message),
        ConditionType.STUCK: why_stuck or Verdict(is_true=False, reason=Reason.NOT_STUCK),
    }


def is_over(verdicts: Mapping[ConditionType, Verdict]) -> bool:
    """Succeeded or failed for good."""
    return verdicts[ConditionType.SUCCEEDED].is_true or verdicts[ConditionType.FAILED].is_true


def headline(verdicts: Mapping[ConditionType, Verdict]) -> str:
    """The word that `kubectl get` shows."""
    stuck = verdicts[ConditionType.STUCK]
    return stuck.reason if stuck.is_true else verdicts[ConditionType.RUNNING].reason


def _judge_stages(run: Run, outcome: Outcome) -> Verdicts:
    states = {s.state for s in outcome.statuses}
    if outcome.failure is not None:
        reason, message = outcome.failure
        return build_verdicts(reason, message, failed=True)
    if states == {"Succeeded"} and all(ruling.opens for ruling in outcome.rulings):
        message = f"all {len(outcome.statuses)} stages succeeded"
        return build_verdicts(Reason.COMPLETED, message, succeeded=True)
    if run.spec.suspend:
        is_idle = not states & {"Starting", "Running", "Restarting"}
        message = "spec.suspend is true" if is_idle else "the workers save a checkpoint"
        return build_verdicts(Reason.SUSPENDED, message, suspended=is_idle)
    return _judge_active(outcome)


def _judge_active(outcome: Outcome) -> Verdicts:
    states = {s.state for s in outcome.statuses}
    pairs = zip(outcome.views, outcome.statuses, strict=True)
    active = [_describe(view, status) for view, status in pairs if status.state in ACTIVE]
    reason = Reason.RUNNING if "Running" in states else Reason.RESTARTING if "Restarting" in states else Reason.STARTING
    stuck = find_stuck(outcome.views, outcome.rulings)
    return build_verdicts(reason, ", ".join(active), running="Running" in states, stuck=stuck)


def _describe(view: View, status: StageStatus) -> str:
    words = f"{status.name} is {status.state.lower()}"
    unheard = view.observed.get(status.name, status.attempt).progress_error
    if status.state != "Running" or not unheard:
        return words
    return f"{words}, how far can't be read ({unheard}); look at NetworkPolicies between the operator and the workers"


def _judge_gates(outcome: Outcome) -> Verdicts:
    """Of the gates, once one was come to."""
    if not outcome.rulings:
        return {}
    failed = [f"stage {r.stage}: {r.message}" for r in outcome.rulings if not r.is_passed]
    reason = Reason.GATE_FAILED if failed else Reason.GATE_PASSED
    message = "; ".join(failed) or f"{len(outcome.rulings)} of {len(outcome.rulings)} passed"
    return {ConditionType.GATES_PASSED: Verdict(is_true=not failed, reason=reason, message=message)}
