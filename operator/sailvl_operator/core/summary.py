"""The status as a whole: conditions and the columns of `kubectl get`, from the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sailvl_operator.api.status import Condition, ConditionType, Reason, StageStatus, Status, Summary
from sailvl_operator.core.units import format_duration, format_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One condition's wanted value."""

    is_true: bool
    reason: Reason
    message: str = ""


def set_conditions(
    status: Status, verdicts: dict[ConditionType, Verdict], *, generation: int, now: float
) -> list[Condition]:
    """All conditions in a fixed order; the transition time moves only when True turns False or back."""
    return [_condition(status.condition(type_), type_, verdicts[type_], generation, now) for type_ in verdicts]


def _condition(old: Condition | None, type_: ConditionType, verdict: Verdict, generation: int, now: float) -> Condition:
    value = "True" if verdict.is_true else "False"
    is_same = old is not None and old.status == value
    return Condition(
        type=type_,
        status="True" if verdict.is_true else "False",
        reason=verdict.reason,
        message=verdict.message[:1024],
        last_transition_time=old.last_transition_time if is_same and old is not None else format_time(now),
        observed_generation=generation,
    )


def summarise(stages: Sequence[StageStatus], *, reason: str, ready: str, goodput: str) -> Summary:
    """The columns: the stage that matters now, how far it is, what its workers do."""
    position, current = _current(stages)
    progress = current.progress
    is_active = current.state not in ("Succeeded", "Failed")
    share = 0 if progress is None or not progress.steps else 100 * progress.step // progress.steps
    eta = progress.eta_seconds if progress is not None and is_active else None
    return Summary(
        stage=f"{current.name} ({position}/{len(stages)})",
        progress=f"{100 if current.state == 'Succeeded' else share}%",
        ready=ready,
        restarts=sum(sum(s.restarts.values()) for s in stages),
        goodput=goodput,
        eta="" if eta is None else format_duration(eta),
        reason=reason,
    )


def _current(stages: Sequence[StageStatus]) -> tuple[int, StageStatus]:
    """The first failed or active stage, else the last that has begun, else the first."""
    by_urgency = [
        [(i, s) for i, s in enumerate(stages, 1) if s.state == "Failed"],
        [(i, s) for i, s in enumerate(stages, 1) if s.state not in ("Failed", "Pending", "Succeeded")],
        [(i, s) for i, s in reversed(list(enumerate(stages, 1))) if s.state == "Succeeded"],
        [(1, stages[0])],
    ]
    return next(group[0] for group in by_urgency if group)
