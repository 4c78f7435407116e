"""A second run on the same storage: what is the same is found, what was changed and what hangs on it is computed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import Story, require_success

pytestmark = pytest.mark.e2e

RUN, CHANGED = "shorter", "preference"
COMPUTED = (CHANGED, "evaluate")
LIMIT = "600s"


@pytest.fixture(scope="module")
def second(kubectl: Kubectl, story: Story) -> dict[str, Any]:
    """Status of the first run's spec with one stage changed, under another name, at its end."""
    in_namespace = ("-n", story.namespace)
    spec = json.loads(require_success(kubectl(*in_namespace, "get", "svr", "demo", "-o", "json")))["spec"]
    [stage] = [s for s in spec["stages"] if s["name"] == CHANGED]
    stage["sft"]["epochs"] = "1"
    document = {
        "apiVersion": "sailvl.dev/v1alpha1",
        "kind": "SailVLRun",
        "metadata": {"name": RUN, "namespace": story.namespace},
        "spec": spec,
    }
    require_success(kubectl("apply", "-f", "-", stdin=json.dumps(document)))
    require_success(kubectl(*in_namespace, "wait", "--for=condition=Succeeded", f"svr/{RUN}", f"--timeout={LIMIT}"))
    status: dict[str, Any] = json.loads(require_success(kubectl(*in_namespace, "get", "svr", RUN, "-o", "json")))[
        "status"
    ]
    require_success(kubectl(*in_namespace, "delete", "svr", RUN, "--timeout=60s"))
    return status


def test_only_what_was_changed_is_computed(second: dict[str, Any]) -> None:
    reused = {stage["name"]: stage.get("reused", False) for stage in second["stages"]}
    assert reused == {name: name not in COMPUTED for name in reused}


def test_what_is_found_is_the_first_run_s(second: dict[str, Any], story: Story) -> None:
    for stage in second["stages"]:
        first = story.stage(stage["name"])
        is_same = stage["name"] not in COMPUTED
        assert (stage["output"] == first["output"]) is is_same
        assert (stage["digest"] == first["digest"]) is is_same
        assert not is_same or stage["metrics"] == first["metrics"]
        assert (story.storage / stage["output"] / "result.json").exists()
