"""Evaluate `stages[].gate`: compare a metric of a stage's result with the bounds that later stages require."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import UNSET

from sailvl_operator.api.status import StageGateResult
from sailvl_operator.api.types import Gate, StageSpec
from sailvl_operator.api.untrusted import clean_line
from sailvl_operator.core.units import parse_decimal

_MAX_LISTED_METRICS = 12
"""Metrics that are listed if the gate's metric is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """Whether a gate passed, with the metric's value and the bound."""

    stage: str
    is_passed: bool
    message: str
    on_fail: str
    """Effect of a failed gate: Stop, Continue or Pause."""

    @property
    def is_open(self) -> bool:
        """Whether later stages may start."""
        return self.is_passed or self.on_fail == "Continue"

    def to_status(self) -> StageGateResult:
        """Return the result as the stage's status shows it."""
        return StageGateResult(passed=self.is_passed, message=clean_line(self.message, 1000))


def evaluate_gate(stage: StageSpec, metrics: Mapping[str, str]) -> GateResult | None:
    """Evaluate the gate of a stage that succeeded with these metrics; None if it has no gate. NaN passes no gate."""
    gate = stage.gate
    if gate is UNSET:
        return None
    if gate.metric not in metrics:
        known = ", ".join(sorted(metrics)[:_MAX_LISTED_METRICS]) or "none"
        message = f"gate failed: the result has no metric {gate.metric}; its metrics are {known}"
        return GateResult(stage=stage.name, is_passed=False, message=message, on_fail=gate.on_fail)
    is_passed, message = _compare(gate, metrics[gate.metric])
    return GateResult(stage=stage.name, is_passed=is_passed, message=message, on_fail=gate.on_fail)


def _compare(gate: Gate, text: str) -> tuple[bool, str]:
    """Return whether a metric's value keeps the gate's bounds, and the comparison as text."""
    value = parse_decimal(text)
    bounds = []
    if gate.at_most is not UNSET:
        bounds.append(f"<= {gate.at_most}")
        if not value <= float(gate.at_most):
            return False, f"gate failed: {gate.metric} is {text}, but must be at most {gate.at_most}"
    if gate.at_least is not UNSET:
        bounds.append(f">= {gate.at_least}")
        if not value >= float(gate.at_least):
            return False, f"gate failed: {gate.metric} is {text}, but must be at least {gate.at_least}"
    return True, f"gate passed: {gate.metric} {text} {' and '.join(bounds)}"
