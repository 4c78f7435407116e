"""A second run on the same storage reuses unchanged stages and computes only the changed one and its dependents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import WholeRun, require_success, wait_for_success

pytestmark = pytest.mark.e2e

RUN, CHANGED = "shorter", "preference"
COMPUTED = (CHANGED, "evaluate")
LIMIT_SECONDS = 600
"""Longest time for the second run, which takes two minutes if the machine does nothing else."""


@pytest.fixture(scope="module")
def second(kubectl: Kubectl, whole_run: WholeRun) -> dict[str, Any]:
    """Run the first run's spec under another name with one changed stage, and return its final status."""
    in_namespace = ("-n", whole_run.namespace)
    spec = json.loads(require_success(kubectl(*in_namespace, "get", "svr", "demo", "-o", "json")))["spec"]
    [stage] = [s for s in spec["stages"] if s["name"] == CHANGED]
    stage["sft"]["epochs"] = "1"
    document = {
        "apiVersion": "sailvl.dev/v1alpha1",
        "kind": "SailVLRun",
        "metadata": {"name": RUN, "namespace": whole_run.namespace},
        "spec": spec,
    }
    require_success(kubectl("apply", "-f", "-", stdin=json.dumps(document)))
    wait_for_success(kubectl, whole_run.namespace, RUN, LIMIT_SECONDS)
    status: dict[str, Any] = json.loads(require_success(kubectl(*in_namespace, "get", "svr", RUN, "-o", "json")))[
        "status"
    ]
    require_success(kubectl(*in_namespace, "delete", "svr", RUN, "--timeout=60s"))
    return status


def test_only_changed_stage_and_its_dependents_are_computed(second: dict[str, Any]) -> None:
    reused = {stage["name"]: stage.get("reused", False) for stage in second["stages"]}
    assert reused == {name: name not in COMPUTED for name in reused}


def test_reused_results_are_those_of_first_run(second: dict[str, Any], whole_run: WholeRun) -> None:
    for stage in second["stages"]:
        first = whole_run.stage(stage["name"])
        is_same = stage["name"] not in COMPUTED
        assert (stage["output"] == first["output"]) is is_same
        assert (stage["digest"] == first["digest"]) is is_same
        assert not is_same or stage["metrics"] == first["metrics"]
        assert (whole_run.storage / stage["output"] / "result.json").exists()
