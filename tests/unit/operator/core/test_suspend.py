"""Tests of suspension and queues: who suspends a Job, and how a stage resumes."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType, Status
from tests.support.builders.operator import SPEC, build_end
from tests.support.core_world import CoreWorld, run_to_active_stage

QUEUED: dict[str, Any] = {
    "stages": SPEC["stages"][2:3],
    "workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"},
}


def set_admission(world: CoreWorld, *, admits: bool) -> None:
    """Admit the newest Job as Kueue does, or preempt it."""
    job = max(world.jobs.values(), key=lambda j: j.attempt)
    world.jobs[job.name] = replace(job, is_suspended=not admits, started=world.now)
    if admits:
        world.add_pods(job)
        return
    world.pods = {n: replace(p, is_gone=True, terminated=build_end(75)) for n, p in world.pods.items()}


def test_queue_admits_preempts_and_readmits_a_job() -> None:
    world = CoreWorld(spec=QUEUED, advances_time=False)
    world.run_until_stable()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.reason, stuck.message) == ("Queued", "stage knowledge waits in Kueue's queue team")
    world.now += 5000
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 1, "the start timeout doesn't run while the Job is queued"
    set_admission(world, admits=True)
    assert run_to_active_stage(world).state == "Running"
    set_admission(world, admits=False)
    again = run_to_active_stage(world)
    assert (again.state, again.attempt, again.restarts) == ("Restarting", 2, {"Preempted": 1})
    set_admission(world, admits=True)
    assert run_to_active_stage(world).state == "Running"
    assert world.status.goodput.seconds["queued"] == 5000


def test_suspending_a_queued_run_deletes_its_job() -> None:
    world = CoreWorld(spec=QUEUED)
    world.run_until_stable()
    set_admission(world, admits=True)
    world.run_until_stable()
    world.spec = QUEUED | {"suspend": True}
    world.run_until_stable()
    assert (world.stage("knowledge").state, world.jobs) == ("Suspended", {})
    world.spec = QUEUED
    world.run_until_stable()
    assert [j.attempt for j in world.jobs.values()] == [2]


def test_run_resumes_before_its_suspension_was_recorded() -> None:
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    job = next(iter(world.jobs.values()))
    world.jobs[job.name], world.pods = replace(job, is_suspended=True), {}
    assert run_to_active_stage(world).attempt == 2
    assert [(j.attempt, j.is_suspended) for j in world.jobs.values()] == [(2, False)]


def test_unrecorded_first_job_is_suspended_with_its_run() -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    world.status = Status()  # the operator died before it wrote the status
    world.spec = {"suspend": True}
    world.run_until_stable()
    assert [j.is_suspended for j in world.jobs.values()] == [True]


def test_pod_on_a_dead_node_ends_the_suspension_after_its_grace_period() -> None:
    """A node that is lost never confirms the end of its pod; 30 s past the grace period it is taken as ended."""
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    world.spec = {"suspend": True}
    delete_by = world.now + 60
    world.update_pods(delete_by=delete_by)
    assert world.stage("curate").state != "Suspended"
    world.now = delete_by + 29.9
    world.run_until_stable()
    assert world.stage("curate").state != "Suspended"
    world.advances_time = True
    world.reconcile_once()
    assert world.now == delete_by + 30, "the run is reconciled again at that time"
    world.run_until_stable()
    assert world.stage("curate").state == "Suspended"
