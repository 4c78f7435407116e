"""Tests of the end of a run: deadline, time to live, and what resumes it."""

from __future__ import annotations

from sailvl_operator.api.status import ConditionType
from tests.support.builders.operator import SPEC
from tests.support.core_world import CoreWorld, finish_run, request_restart, run_to_active_stage


def test_deadline_fails_the_run_and_a_later_one_resumes_it() -> None:
    world = CoreWorld(spec={"activeDeadlineSeconds": 600}, advances_time=False)
    world.run_until_stable()
    world.now += 599
    world.run_until_stable()
    assert world.status.is_true(ConditionType.RUNNING)
    world.now += 2
    world.run_until_stable()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "DeadlineExceeded")
    assert world.jobs == {}, "its workers are deleted"
    world.spec, world.generation = {"activeDeadlineSeconds": 6000}, 2
    assert run_to_active_stage(world).attempt == 2
    assert not world.status.is_true(ConditionType.FAILED)


def test_suspended_time_does_not_count_against_the_deadline() -> None:
    world = CoreWorld(spec={"activeDeadlineSeconds": 600, "suspend": True}, advances_time=False)
    world.run_until_stable()
    world.now += 10_000
    world.spec = {"activeDeadlineSeconds": 600}
    world.run_until_stable()
    assert world.status.is_true(ConditionType.RUNNING)


def test_finished_run_is_deleted_after_its_ttl() -> None:
    world = CoreWorld(spec={"ttlSecondsAfterFinished": 60})
    finish_run(world)
    assert not world.is_deleted
    world.now += 61
    world.reconcile_once()
    assert world.is_deleted


def test_finished_run_records_the_observed_generation() -> None:
    world = CoreWorld()
    finish_run(world)
    world.generation = 7
    world.run_until_stable()
    assert world.status.observed_generation == 7


def test_failed_run_suspends_other_stages_and_can_resume() -> None:
    curate = SPEC["stages"][0]
    world = CoreWorld(spec={"stages": [curate | {"name": "left"}, curate | {"name": "right", "dependsOn": []}]})
    world.run_until_stable()
    world.end_worker(0, 64)
    world.run_until_stable()
    assert {s.name: s.state for s in world.status.stages} == {"left": "Failed", "right": "Suspended"}
    assert world.jobs == {}
    request_restart(world, "left")
    assert {s.name: (s.state, s.attempt) for s in world.status.stages} == {
        "left": ("Running", 2),
        "right": ("Running", 2),
    }
