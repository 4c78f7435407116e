"""Tests of the restart policy: budgets, counted restarts, excluded nodes, and restarts on request."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType
from tests.support.builders.operator import SPEC
from tests.support.core_world import CoreWorld, fail_attempt, finish_run, request_restart, run_to_active_stage

TRAINING: dict[str, Any] = {"stages": SPEC["stages"][2:3], "restartPolicy": {"maxRestarts": 2}}


def test_saved_progress_resets_counted_restarts() -> None:
    world = CoreWorld(spec=TRAINING)
    for saved in (10, 10, 20, 20, 30):
        fail_attempt(world, saved=saved)
    knowledge = world.stage("knowledge")
    assert (knowledge.restarts, knowledge.counted_restarts) == ({"Crash": 5}, {"Crash": 1})
    assert not world.status.is_true(ConditionType.FAILED)


def test_time_does_not_reset_counted_restarts() -> None:
    world = CoreWorld(spec=TRAINING)
    for saved in (10, 10):
        fail_attempt(world, saved=saved)
        world.now += 1_000_000
    fail_attempt(world, saved=10)
    assert world.status.is_true(ConditionType.FAILED)
    assert world.status.goodput.lost_steps == 10, "a new attempt may still resume from the last one"


def test_missing_results_use_up_the_infra_budget() -> None:
    world = CoreWorld(spec={"restartPolicy": {"maxInfraRestarts": 2}})
    while not world.status.is_true(ConditionType.FAILED):
        if world.run_until_stable() is not None:
            for pod in [p for p in world.pods.values() if p.terminated is None]:
                world.end_worker(pod.index, 0)
    assert len(world.started) == 3


def test_job_deleted_before_its_pods_were_observed_starts_a_new_attempt() -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    (job,) = world.jobs.values()
    world.jobs, world.pods = {job.name: replace(job, is_gone=True)}, {}
    assert run_to_active_stage(world).attempt == 2
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_node_with_many_failures_is_excluded_and_reported() -> None:
    world = CoreWorld(spec=TRAINING | {"restartPolicy": {"maxFailuresPerNode": 2}})
    for saved in (10, 20):
        fail_attempt(world, saved=saved, code=139)
    world.run_until_stable()
    assert world.started[-1].excluded_nodes == ("node-0",)
    event = next(e for e in world.events if e.reason == "NodeExcluded")
    assert event.message.startswith("Node node-0 caused 2 failures of stage knowledge and is excluded")


def test_start_timeout_readmits_excluded_nodes() -> None:
    spec = TRAINING | {"restartPolicy": {"maxFailuresPerNode": 1, "startTimeoutSeconds": 60}}
    world = CoreWorld(spec=spec)
    fail_attempt(world, saved=10, code=139)
    world.advances_time = False
    world.now += 100
    world.reconcile_once()
    assert world.started[-1].excluded_nodes == ("node-0",)
    world.update_pods(phase="Pending", is_ready=False, unschedulable="0/2 nodes are available")
    world.now += 1000
    world.run_until_stable()
    assert world.stage("knowledge").node_failures == {}
    assert world.started[-1].excluded_nodes == ()


def test_cost_is_computed_from_gpu_seconds() -> None:
    spec = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 8}, "pricePerGpuHour": "2.50"}
    world = CoreWorld(spec=spec, advances_time=False)
    world.run_until_stable()
    world.now += 3600
    fail_attempt(world, saved=0)
    assert (world.status.goodput.cost, world.status.goodput.lost_cost) == ("40.00", "40.00")


def test_restart_request_restarts_a_failed_stage() -> None:
    world = CoreWorld()
    world.run_until_stable()
    world.end_worker(0, 64, message="unknown preset")
    world.run_until_stable()
    assert world.status.is_true(ConditionType.FAILED)
    request_restart(world, "curate")
    curate = world.stage("curate")
    assert (curate.state, curate.attempt, curate.counted_restarts) == ("Running", 2, {})
    assert not world.status.is_true(ConditionType.FAILED)
    finish_run(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_restart_request_restarts_a_running_stage() -> None:
    world = CoreWorld()
    world.run_until_stable()
    request_restart(world, "curate")
    assert (world.stage("curate").attempt, [j.attempt for j in world.jobs.values()]) == (2, [2])
    request_restart(world, "curate")
    assert world.stage("curate").attempt == 3


REFUSED = [
    pytest.param("nonsense", "there is no stage 'nonsense'; stages are curate, alignment", id="unknown"),
    pytest.param("evaluate", "stage evaluate has not started", id="not started"),
]


@pytest.mark.parametrize(("stage", "message"), REFUSED)
def test_impossible_restart_request_is_explained(stage: str, message: str) -> None:
    world = CoreWorld()
    world.run_until_stable()
    request_restart(world, stage)
    assert message in world.events[-1].message
    assert world.stage("curate").attempt == 1


def test_restart_request_of_a_succeeded_run_is_refused() -> None:
    world = CoreWorld()
    finish_run(world)
    request_restart(world, "curate")
    assert "has its result" in world.events[-1].message
    assert world.status.is_true(ConditionType.SUCCEEDED)
