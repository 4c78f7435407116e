"""Tests of started stages: they continue as they started, whatever happens to spec, queue or cluster meanwhile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType, StageCheckpoint, Status, encode_status
from sailvl_operator.core.decision import Decision
from sailvl_operator.core.finished import reconcile_unreadable
from sailvl_operator.core.observe import observe
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import SPEC, build_run
from tests.support.core_world import DEFAULTS, CoreWorld, finish_run

TRAINING: dict[str, Any] = {"stages": SPEC["stages"][2:3]}


def build_spec(**settings: Any) -> dict[str, Any]:
    [stage] = copy.deepcopy(TRAINING["stages"])
    stage["sft"] |= settings
    return {"stages": [stage]}


def test_first_job_from_an_outdated_spec_is_replaced() -> None:
    """The spec was edited after the Job was created and before a status was written."""
    world = CoreWorld(spec=build_spec(epochs="1"))
    world.reconcile_once()
    [first] = world.started
    name, job = next(iter(world.jobs.items()))
    world.jobs[name] = replace(job, digest=first.document.digest[:12])
    world.status, world.spec = Status(), build_spec(epochs="2")
    world.run_until_stable()
    second = world.started[-1].document
    assert (second.attempt, second.train.epochs) == (2, 2.0)
    assert second.digest != first.document.digest
    assert world.stage("knowledge").digest == second.digest
    assert world.stage("knowledge").restarts == {}
    assert list(world.jobs) == ["demo-knowledge-2"]


def test_edited_workers_keep_digest_and_output_of_a_started_stage() -> None:
    """The default precision depends on GPUs, but the stage's checkpoints are still found."""
    world = CoreWorld(spec=TRAINING)
    world.run_until_stable()
    world.spec = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 8}}
    world.end_worker(0, 137)
    world.end_worker(1, 137)
    world.run_until_stable()
    world.run_until_stable()  # the backoff is over
    first, second = (attempt.document for attempt in world.started)
    assert second.attempt == 2
    assert (second.digest, second.output) == (first.digest, first.output)


@pytest.mark.parametrize("is_node_dead", [False, True])
def test_suspension_waits_for_workers_except_on_a_dead_node(is_node_dead: bool) -> None:
    world = CoreWorld(spec=TRAINING, advances_time=False)
    world.run_until_stable()
    _, other = world.pods
    world.spec = TRAINING | {"suspend": True}
    world.run_until_stable()
    world.end_worker(0, 75)
    world.pods[other] = replace(world.pods[other], is_deleting=True, is_ready=False, delete_by=world.now + 120)
    world.now += 120
    world.run_until_stable()
    assert world.stage("knowledge").state == "Running", "its workers have their grace period"
    if is_node_dead:
        world.now += 31
    else:
        world.end_worker(1, 75)
    world.run_until_stable()
    assert world.stage("knowledge").state == "Suspended"
    world.spec = TRAINING
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 2


def test_start_timeout_begins_at_admission() -> None:
    world = CoreWorld(
        spec=TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"}}, advances_time=False
    )
    world.run_until_stable()
    name, job = next(iter(world.jobs.items()))
    world.now += 10_000
    world.jobs[name] = replace(job, is_suspended=False, started=0.0)
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 1
    world.jobs[name] = replace(job, is_suspended=False, started=world.now)
    world.now += 901
    world.run_until_stable()
    assert world.stage("knowledge").restarts == {"Infra": 1}


def test_queued_job_is_deleted_on_suspension_after_the_queue_left_the_spec() -> None:
    """The queue was removed from the spec, which applies only to the next attempt."""
    queued = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"}}
    world = CoreWorld(spec=queued, advances_time=False)
    world.run_until_stable()
    name, job = next(iter(world.jobs.items()))
    world.jobs[name] = replace(job, is_suspended=False)
    world.add_pods(job)
    world.run_until_stable()
    world.spec = TRAINING | {"suspend": True}
    world.run_until_stable()
    assert world.jobs == {}, "a suspended Job would be resumed by the queue"


def test_externally_suspended_job_waits_for_its_owner() -> None:
    """Kueue with manageJobsWithoutQueueName, or a webhook, may do so; no new attempt is started meanwhile."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]}, advances_time=False)
    world.reconcile_once()
    (name,) = world.jobs
    world.jobs[name], world.pods = replace(world.jobs[name], is_suspended=True), {}
    world.now += 5000
    world.run_until_stable()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.reason, world.stage("knowledge").attempt) == ("Queued", 1)
    assert "was suspended externally" in stuck.message
    world.jobs[name] = replace(world.jobs[name], is_suspended=False, started=world.now)
    world.add_pods(world.jobs[name])
    world.run_until_stable()
    assert world.stage("knowledge").state == "Running"


def test_attempt_numbers_of_an_earlier_run_of_the_same_name_are_skipped() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.run_until_stable()
    world.end_worker(
        0, 75, message="attempt 11 has claimed the stage; attempt 1 is superseded and stops", superseded_by=11
    )
    world.end_worker(1, 76)
    world.run_until_stable()
    assert [a.document.attempt for a in world.started] == [1, 12]
    assert world.stage("knowledge").counted_restarts == {"Preempted": 1}


def test_implausible_attempt_number_is_ignored() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.run_until_stable()
    world.end_worker(0, 75, superseded_by=10**12)
    world.end_worker(1, 75, superseded_by=-1)
    world.run_until_stable()
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_checkpoint_is_read_from_termination_messages() -> None:
    """The checkpoint is known even if /progress of the workers can't be reached."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.run_until_stable()
    for index in range(2):
        world.end_worker(index, 75, checkpoint={"step": 733, "path": "demo/checkpoints/733"})
    world.run_until_stable()
    assert world.stage("knowledge").checkpoint == StageCheckpoint(step=733, path="demo/checkpoints/733")


def test_rejected_run_can_be_suspended() -> None:
    world = CoreWorld()
    world.run_until_stable()
    world.spec, world.generation = {"engine": {"name": "fsdp2"}}, 2
    world.run_until_stable()
    assert world.status.is_true(ConditionType.FAILED)
    assert not any(job.is_suspended for job in world.jobs.values()), "its workers continue"
    world.spec, world.generation = {"engine": {"name": "fsdp2"}, "suspend": True}, 3
    world.run_until_stable()
    assert [job.is_suspended for job in world.jobs.values()] == [True]


def test_rejected_run_is_deleted_after_its_ttl() -> None:
    world = CoreWorld(spec={"engine": {"name": "fsdp2"}, "ttlSecondsAfterFinished": 60}, advances_time=False)
    world.run_until_stable()
    assert world.status.completion_time
    assert not world.is_deleted
    world.now += 61
    world.reconcile_once()
    assert world.is_deleted


def test_container_may_wait_for_its_secret_before_the_attempt_fails() -> None:
    world = CoreWorld(spec=TRAINING, advances_time=False)
    world.reconcile_once()
    world.pods = {
        name: replace(
            pod, phase="Pending", is_ready=False, waiting_reason="CreateContainerConfigError", ended_seen=world.now
        )
        for name, pod in world.pods.items()
    }
    world.now += 59
    world.run_until_stable()
    assert world.stage("knowledge").state == "Starting"
    world.now += 1
    world.run_until_stable()
    assert world.stage("knowledge").state == "Failed"
    assert DEFAULTS.failure_settle_seconds < 59


def test_requested_restart_loses_unsaved_training() -> None:
    world = CoreWorld(spec=TRAINING, advances_time=False)
    world.run_until_stable()
    world.now += 100
    world.progress["knowledge", 1] = Progress(attempt=1, phase="running", step=5, seconds={"training": 100.0})
    world.restart_stage = "knowledge"
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 2
    assert world.status.goodput.seconds == {"lost": 100}


def reject(world: CoreWorld) -> Decision:
    """Reject the spec as an older version does to which one of its fields is unknown."""
    run = build_run(status=encode_status(world.status), **world.spec)
    return reconcile_unreadable(run, "unknown field", observe(), now=world.now)


def test_unreadable_spec_does_not_harm_the_run() -> None:
    world = CoreWorld(spec=TRAINING)
    world.run_until_stable()
    decision = reject(world)
    assert decision.status is not None
    assert decision.status.is_true(ConditionType.FAILED)
    world.status = decision.status
    world.run_until_stable()
    assert not world.status.is_true(ConditionType.FAILED)
    assert (world.stage("knowledge").state, world.stage("knowledge").attempt) == ("Running", 1)
    finish_run(world)
    assert reject(world) == Decision(), "a succeeded run stays succeeded"
