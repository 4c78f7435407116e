"""Tests of gates: whether the next stage starts, and how a failed gate is reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sailvl_operator.api.status import ConditionType
from tests.support.builders.operator import SPEC
from tests.support.core_world import CoreWorld, finish_run, run_to_active_stage


def build_gated_spec(**bounds: Any) -> dict[str, Any]:
    """Return a spec with a gate on its first training stage."""
    stages = copy.deepcopy(SPEC["stages"])
    stages[1]["gate"] = {"metric": "heldOutLoss"} | bounds
    return {"stages": stages}


def run_to_gate(spec: dict[str, Any], loss: float | None = 2.4) -> CoreWorld:
    """Return a world whose gated stage has just succeeded with a held-out loss."""
    world = CoreWorld(spec=spec)
    world.succeed_stage(run_to_active_stage(world))
    alignment = run_to_active_stage(world)
    assert alignment.name == "alignment"
    world.succeed_stage(alignment, metrics={} if loss is None else {"heldOutLoss": loss})
    world.run_until_stable()
    return world


GATES = [
    pytest.param({"atMost": "2.5"}, 2.4, "knowledge", "True", "GatePassed", id="passes"),
    pytest.param({"atMost": "2.4"}, 2.4, "knowledge", "True", "GatePassed", id="the bound itself passes"),
    pytest.param({"atLeast": "2.5"}, 2.6, "knowledge", "True", "GatePassed", id="a lower bound"),
    pytest.param({"atMost": "2.1", "onFail": "Continue"}, 2.4, "knowledge", "False", "GateFailed", id="continues"),
    pytest.param({"atMost": "2.1", "onFail": "Pause"}, 2.4, None, "False", "GateFailed", id="pauses"),
    pytest.param({"atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="stops"),
    pytest.param({"atMost": "2.1"}, None, None, "False", "GateFailed", id="metric missing because it was not finite"),
    pytest.param({"metric": "other", "atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="unknown metric"),
]


@pytest.mark.parametrize(("bounds", "loss", "next_stage", "value", "reason"), GATES)
def test_gate_decides_whether_the_next_stage_starts(
    bounds: dict[str, str], loss: float | None, next_stage: str | None, value: str, reason: str
) -> None:
    world = run_to_gate(build_gated_spec(**bounds), loss)
    condition = world.status.condition(ConditionType.GATES_PASSED)
    assert condition is not None
    assert (condition.status, condition.reason) == (value, reason)
    assert world.started[-1].document.stage == (next_stage or "alignment")
    result = world.stage("alignment").gate_result
    assert result is not None
    assert result.passed == (value == "True")
    assert result.message in condition.message or result.passed
    assert world.status.is_true(ConditionType.FAILED) == (next_stage is None and "onFail" not in bounds)


def test_paused_gate_is_reported_as_stuck() -> None:
    world = run_to_gate(build_gated_spec(atMost="2.1", onFail="Pause"))
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "GateNotPassed")
    assert stuck.message == (
        "stage alignment: gate failed: heldOutLoss is 2.4, but must be at most 2.1; relax the gate's bound, or set "
        "onFail: Continue"
    )
    assert world.status.summary.reason == "GateNotPassed"
    assert world.events[-1].reason == "GateNotPassed"


@pytest.mark.parametrize("on_fail", ["Pause", "Stop"])
def test_relaxed_gate_resumes_the_run(on_fail: str) -> None:
    world = run_to_gate(build_gated_spec(atMost="2.1", onFail=on_fail))
    world.spec, world.generation = build_gated_spec(atMost="3", onFail=on_fail), 2
    finish_run(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)
    assert [a.document.stage for a in world.started] == ["curate", "alignment", "knowledge", "evaluate"]


def test_failed_gate_of_the_last_stage_fails_the_run() -> None:
    stages = copy.deepcopy(SPEC["stages"][:1])
    stages[0]["gate"] = {"metric": "kept", "atLeast": "10"}
    world = CoreWorld(spec={"stages": stages})
    world.succeed_stage(run_to_active_stage(world), metrics={"kept": 3})
    world.run_until_stable()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "GateFailed")


def test_failed_lower_bound_advises_to_relax_the_gate() -> None:
    world = run_to_gate(build_gated_spec(atLeast="2.5", onFail="Pause"))
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert stuck.message == (
        "stage alignment: gate failed: heldOutLoss is 2.4, but must be at least 2.5; relax the gate's bound, or set "
        "onFail: Continue"
    )
