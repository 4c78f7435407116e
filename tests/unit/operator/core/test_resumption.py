"""What has begun is gone on with as it was begun, whatever the spec, the queue or the cluster came to be meanwhile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType, StageCheckpoint, Status, encode_status
from sailvl_operator.core.decision import Decision
from sailvl_operator.core.invalid_spec import reconcile_unreadable
from sailvl_operator.core.observe import observe
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import SPEC, build_run
from tests.support.core_world import DEFAULTS, World, finish

TRAINING: dict[str, Any] = {"stages": SPEC["stages"][2:3]}


def with_settings(**settings: Any) -> dict[str, Any]:
    [stage] = copy.deepcopy(TRAINING["stages"])
    stage["sft"] |= settings
    return {"stages": [stage]}


def test_a_first_job_of_an_earlier_spec_is_replaced() -> None:
    """It was made, and the spec was edited before a status told of it."""
    world = World(spec=with_settings(epochs="1"))
    world.step()
    [first] = world.started
    name, job = next(iter(world.jobs.items()))
    world.jobs[name] = replace(job, digest=first.document.digest[:12])
    world.status, world.spec = Status(), with_settings(epochs="2")
    world.settle()
    second = world.started[-1].document
    assert (second.attempt, second.train.epochs) == (2, 2.0)
    assert second.digest != first.document.digest
    assert world.stage("knowledge").digest == second.digest
    assert world.stage("knowledge").restarts == {}
    assert list(world.jobs) == ["demo-knowledge-2"]


def test_other_workers_don_t_make_a_stage_another() -> None:
    """Its default precision hangs on whether there are GPUs; its checkpoints are found all the same."""
    world = World(spec=TRAINING)
    world.settle()
    world.spec = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 8}}
    world.end(0, 137)
    world.end(1, 137)
    world.settle()
    world.settle()  # after the backoff
    first, second = (attempt.document for attempt in world.started)
    assert second.attempt == 2
    assert (second.digest, second.output) == (first.digest, first.output)


@pytest.mark.parametrize("is_node_dead", [False, True])
def test_a_suspension_waits_for_workers_but_not_for_a_dead_node(is_node_dead: bool) -> None:
    world = World(spec=TRAINING, is_patient=False)
    world.settle()
    _, other = world.pods
    world.spec = TRAINING | {"suspend": True}
    world.settle()
    world.end(0, 75)
    world.pods[other] = replace(world.pods[other], is_deleting=True, is_ready=False, delete_by=world.now + 120)
    world.now += 120
    world.settle()
    assert world.stage("knowledge").state == "Running", "its workers have their grace"
    if is_node_dead:
        world.now += 31
    else:
        world.end(1, 75)
    world.settle()
    assert world.stage("knowledge").state == "Suspended"
    world.spec = TRAINING
    world.settle()
    assert world.stage("knowledge").attempt == 2


def test_a_job_that_was_just_let_go_has_its_whole_time() -> None:
    world = World(spec=TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"}}, is_patient=False)
    world.settle()
    name, job = next(iter(world.jobs.items()))
    world.now += 10_000
    world.jobs[name] = replace(job, is_suspended=False, started=0.0)
    world.settle()
    assert world.stage("knowledge").attempt == 1
    world.jobs[name] = replace(job, is_suspended=False, started=world.now)
    world.now += 901
    world.settle()
    assert world.stage("knowledge").restarts == {"Infra": 1}


def test_whose_a_job_s_suspend_is_says_the_job() -> None:
    """The queue was taken out of the spec, which counts from the next attempt on."""
    queued = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"}}
    world = World(spec=queued, is_patient=False)
    world.settle()
    name, job = next(iter(world.jobs.items()))
    world.jobs[name] = replace(job, is_suspended=False)
    world.add_pods(job)
    world.settle()
    world.spec = TRAINING | {"suspend": True}
    world.settle()
    assert world.jobs == {}, "the Job goes, or the queue would start it again"


def test_a_job_that_somebody_else_suspends_waits_for_them() -> None:
    """As Kueue does with manageJobsWithoutQueueName, or a webhook: no attempt follows another meanwhile."""
    world = World(spec={"stages": SPEC["stages"][2:3]}, is_patient=False)
    world.step()
    (name,) = world.jobs
    world.jobs[name], world.pods = replace(world.jobs[name], is_suspended=True), {}
    world.now += 5000
    world.settle()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.reason, world.stage("knowledge").attempt) == ("Queued", 1)
    assert "was suspended externally" in stuck.message
    world.jobs[name] = replace(world.jobs[name], is_suspended=False, started=world.now)
    world.add_pods(world.jobs[name])
    world.settle()
    assert world.stage("knowledge").state == "Running"


def test_attempts_that_a_deleted_run_of_this_name_left_are_passed_by_at_once() -> None:
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.settle()
    world.end(0, 75, message="attempt 11 has claimed the stage; attempt 1 is superseded and stops", superseded_by=11)
    world.end(1, 76)
    world.settle()
    assert [a.document.attempt for a in world.started] == [1, 12]
    assert world.stage("knowledge").counted_restarts == {"Preempted": 1}


def test_a_number_that_can_t_be_is_no_attempt() -> None:
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.settle()
    world.end(0, 75, superseded_by=10**12)
    world.end(1, 75, superseded_by=-1)
    world.settle()
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_the_last_words_of_workers_tell_their_checkpoint() -> None:
    """Also where nobody reaches their /progress."""
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.settle()
    for index in range(2):
        world.end(index, 75, checkpoint={"step": 733, "path": "demo/checkpoints/733"})
    world.settle()
    assert world.stage("knowledge").checkpoint == StageCheckpoint(step=733, path="demo/checkpoints/733")


def test_a_refused_run_stops_when_it_is_suspended() -> None:
    world = World()
    world.settle()
    world.spec, world.generation = {"engine": {"name": "fsdp2"}}, 2
    world.settle()
    assert world.status.is_true(ConditionType.FAILED)
    assert not any(job.is_suspended for job in world.jobs.values()), "its workers go on"
    world.spec, world.generation = {"engine": {"name": "fsdp2"}, "suspend": True}, 3
    world.settle()
    assert [job.is_suspended for job in world.jobs.values()] == [True]


def test_a_refused_run_goes_when_its_time_has_come() -> None:
    world = World(spec={"engine": {"name": "fsdp2"}, "ttlSecondsAfterFinished": 60}, is_patient=False)
    world.settle()
    assert world.status.completion_time
    assert not world.is_deleted
    world.now += 61
    world.step()
    assert world.is_deleted


def test_a_container_may_wait_for_its_secret_for_a_while() -> None:
    world = World(spec=TRAINING, is_patient=False)
    world.step()
    world.pods = {
        name: replace(
            pod, phase="Pending", is_ready=False, waiting_reason="CreateContainerConfigError", ended_seen=world.now
        )
        for name, pod in world.pods.items()
    }
    world.now += 59
    world.settle()
    assert world.stage("knowledge").state == "Starting"
    world.now += 1
    world.settle()
    assert world.stage("knowledge").state == "Failed"
    assert DEFAULTS.failure_settle_seconds < 59


def test_a_restart_by_hand_loses_what_was_not_saved() -> None:
    world = World(spec=TRAINING, is_patient=False)
    world.settle()
    world.now += 100
    world.progress["knowledge", 1] = Progress(attempt=1, phase="running", step=5, seconds={"training": 100.0})
    world.restart_stage = "knowledge"
    world.settle()
    assert world.stage("knowledge").attempt == 2
    assert world.status.goodput.seconds == {"lost": 100}


def refuse(world: World) -> Decision:
    """As an older version does, to which a field of the spec is unknown."""
    run = build_run(status=encode_status(world.status), **world.spec)
    return reconcile_unreadable(run, "unknown field", observe(), now=world.now)


def test_a_version_that_can_t_read_a_run_spoils_nothing() -> None:
    world = World(spec=TRAINING)
    world.settle()
    decision = refuse(world)
    assert decision.status is not None
    assert decision.status.is_true(ConditionType.FAILED)
    world.status = decision.status
    world.settle()
    assert not world.status.is_true(ConditionType.FAILED)
    assert (world.stage("knowledge").state, world.stage("knowledge").attempt) == ("Running", 1)
    finish(world)
    assert refuse(world) == Decision(), "a success stays one"
