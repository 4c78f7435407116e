"""Whether what follows a stage may begin: its gate's bounds against its result's metrics; called by `reconcile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import UNSET

from sailvl_operator.api.types import Gate, Stage

_LISTED = 12
"""Metrics named where the asked one is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What became of a gate."""

    stage: str
    is_passed: bool
    message: str
    on_fail: str
    """Stop, Continue or Pause."""

    @property
    def opens(self) -> bool:
        """Whether the stages behind it may begin."""
        return self.is_passed or self.on_fail == "Continue"


def rule(stage: Stage, metrics: Mapping[str, str]) -> Ruling | None:
    """The ruling on a stage that succeeded with these metrics; None: it has no gate."""
    gate = stage.gate
    if gate is UNSET:
        return None
    problem = _find_problem(gate, metrics)
    words = problem or f"{gate.metric} is {metrics[gate.metric]}, as its gate wants"
    return Ruling(stage=stage.name, is_passed=not problem, message=words, on_fail=gate.on_fail)


def _find_problem(gate: Gate, metrics: Mapping[str, str]) -> str:
    """Why a gate holds; empty when it opens. NaN passes no gate."""
    if gate.metric not in metrics:
        known = ", ".join(sorted(metrics)[:_LISTED]) or "none"
        return f"the result has no metric {gate.metric}, which its gate asks for; it has {known}"
    value = float(metrics[gate.metric])
    if gate.at_most is not UNSET and not value <= float(gate.at_most):
        return f"{gate.metric} is {metrics[gate.metric]}; its gate wants at most {gate.at_most}"
    if gate.at_least is not UNSET and not value >= float(gate.at_least):
        return f"{gate.metric} is {metrics[gate.metric]}; its gate wants at least {gate.at_least}"
    return ""
