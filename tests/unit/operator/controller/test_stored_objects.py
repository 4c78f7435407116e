"""A new version of the operator takes over a run in progress from the objects that an earlier version stored.

stored/<version>.json has the objects of one run as that version left them: curate succeeded, the second attempt of
alignment running after a crash.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.api import names
from tests.support.builders.operator import build_result
from tests.support.controller_world import KEY, ControllerWorld, running

STORED = sorted(Path(__file__).with_name("stored").glob("*.json"))


@pytest.fixture(params=STORED, ids=lambda path: path.stem)
async def upgraded(request: pytest.FixtureRequest) -> AsyncIterator[tuple[ControllerWorld, dict[str, Any]]]:
    """Return the world in which the current operator has just started, and the status before that."""
    objects: dict[str, list[dict[str, Any]]] = json.loads(request.param.read_bytes())
    async with running() as world:
        for plural, found in objects.items():
            for body in found:
                world.api.put(plural, copy.deepcopy(body))
        await world.until_idle()
        world.send_event(world.run, "ADDED")
        await world.until_idle()
        [run] = objects["sailvlruns"]
        yield world, run["status"]


async def test_running_attempt_continues(upgraded):
    world, before = upgraded
    assert world.api.list_names("jobs") == {"demo-curate-1", "demo-alignment-2"}, "no Job is created or deleted"
    assert world.states() == {stage["name"]: (stage["state"], stage.get("attempt", 0)) for stage in before["stages"]}
    alignment = world.status.stages[1]
    assert (alignment.restarts, alignment.last_failure.cause) == ({"Crash": 1}, "Crash")


async def test_digests_are_unchanged(upgraded):
    """A changed digest would recompute every finished stage after an upgrade."""
    world, before = upgraded
    planned = {p.stage.name: p.digest for p in world.runs.get(KEY).planned}
    assert all(planned[stage["name"]] == stage["digest"] for stage in before["stages"] if "digest" in stage)


async def test_run_succeeds(upgraded):
    world, _ = upgraded
    for stage, attempt, nodes in (("alignment", 2, 2), ("knowledge", 1, 2), ("evaluate", 1, 1)):
        await world.until(
            lambda stage=stage, n=attempt: names.job_name("demo", stage, n) in world.api.list_names("jobs")
        )
        await world.add_pods(stage, attempt, nodes)
        await world.until(lambda stage=stage: world.states()[stage][0] == "Running")
        for index in range(nodes):
            await world.end_pod(stage, attempt, index, 0, result=build_result(stage))
        await world.until(lambda stage=stage: world.states()[stage][0] == "Succeeded")
    await world.until(lambda: world.status.is_true("Succeeded"))
    made = [path for method, path in world.api.list_writes() if method == "POST" and path.endswith("/jobs")]
    assert len(made) == 2, "no attempt is repeated"
