"""A spec outside of an allow-list: nothing is created for it, and the run says which field and what is allowed."""

from __future__ import annotations

import pytest

from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.status import ConditionType, Reason
from tests.support.core_world import CoreWorld, fail_attempt, run_to_active_stage

ALLOWED = AllowLists(priority_classes=("batch",), images=("registry.example.com",))
CRITICAL = {"workers": {"nodes": 2, "gpusPerNode": 0, "priorityClassName": "system-node-critical"}}
MESSAGE = "spec.workers.priorityClassName: system-node-critical is not allowed by the operator; it allows batch"


def find_failure(world: CoreWorld) -> tuple[str, str] | None:
    condition = world.status.condition(ConditionType.FAILED)
    return (condition.reason, condition.message) if condition is not None and condition.status == "True" else None


def test_nothing_is_created_for_a_spec_outside_of_an_allow_list() -> None:
    world = CoreWorld(spec=CRITICAL, allowed=ALLOWED)
    world.run_until_stable()
    assert find_failure(world) == (Reason.INVALID_SPEC, MESSAGE)
    assert (world.jobs, world.started) == ({}, [])
    assert [event.message for event in world.events] == [MESSAGE]


def test_run_starts_once_its_spec_is_corrected() -> None:
    world = CoreWorld(spec=CRITICAL, allowed=ALLOWED)
    world.run_until_stable()
    world.spec, world.generation = {}, 2
    assert run_to_active_stage(world).state == "Running"


@pytest.mark.parametrize("changed", ["the spec", "the lists"])
def test_running_attempt_continues_and_no_further_one_starts(changed: str) -> None:
    world = CoreWorld(spec=CRITICAL, allowed=AllowLists() if changed == "the lists" else ALLOWED)
    if changed == "the spec":
        world.spec = {}
    run_to_active_stage(world)
    jobs = dict(world.jobs)
    if changed == "the spec":
        world.spec, world.generation = CRITICAL, 2
    world.allowed = ALLOWED
    world.run_until_stable()
    assert find_failure(world) == (Reason.INVALID_SPEC, MESSAGE)
    assert world.jobs == jobs
    fail_attempt(world, saved=0)
    assert len(world.started) == 1
    world.spec, world.generation = {}, 3
    world.run_until_stable()  # to the end of the backoff
    world.run_until_stable()
    assert len(world.started) == 2


def test_message_follows_a_change_of_the_lists() -> None:
    world = CoreWorld(spec=CRITICAL, allowed=ALLOWED)
    world.run_until_stable()
    world.allowed = AllowLists(priority_classes=("batch", "low"))
    world.run_until_stable()
    assert find_failure(world) == (Reason.INVALID_SPEC, f"{MESSAGE}, low")


def test_run_resumes_once_the_lists_allow_its_spec() -> None:
    world = CoreWorld(spec=CRITICAL, allowed=ALLOWED)
    world.run_until_stable()
    world.allowed = AllowLists()
    assert run_to_active_stage(world).state == "Running"
