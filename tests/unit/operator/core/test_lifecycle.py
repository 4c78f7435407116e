"""What ends, holds back or starts a run again besides its workers: gates, deadlines, people, queues, budgets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType, Status
from sailvl_trainer.contract import Checkpoint, Progress
from tests.support.builders.operator import SPEC, build_end
from tests.support.core_world import World, finish


def gate(**bounds: Any) -> dict[str, Any]:
    """The good run with a gate behind its first training stage."""
    stages = copy.deepcopy(SPEC["stages"])
    stages[1]["gate"] = {"metric": "heldOutLoss"} | bounds
    return {"stages": stages}


def run_up_to_the_gate(spec: dict[str, Any], loss: float | None = 2.4) -> World:
    """A world whose gated stage has just succeeded with a held-out loss."""
    world = World(spec=spec)
    world.succeed(settled(world))
    alignment = settled(world)
    assert alignment.name == "alignment"
    world.succeed(alignment, metrics={} if loss is None else {"heldOutLoss": loss})
    world.settle()
    return world


def settled(world: World) -> Any:
    active = world.settle()
    assert active is not None
    return active


GATES = [
    pytest.param({"atMost": "2.5"}, 2.4, "knowledge", "True", "GatePassed", id="it holds"),
    pytest.param({"atMost": "2.4"}, 2.4, "knowledge", "True", "GatePassed", id="the bound itself passes"),
    pytest.param({"atLeast": "2.5"}, 2.6, "knowledge", "True", "GatePassed", id="a lower bound"),
    pytest.param({"atMost": "2.1", "onFail": "Continue"}, 2.4, "knowledge", "False", "GateFailed", id="on with a word"),
    pytest.param({"atMost": "2.1", "onFail": "Pause"}, 2.4, None, "False", "GateFailed", id="waits for people"),
    pytest.param({"atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="stops"),
    pytest.param({"atMost": "2.1"}, None, None, "False", "GateFailed", id="no such metric: it was not a number"),
    pytest.param({"metric": "other", "atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="a metric it hasn't"),
]


@pytest.mark.parametrize(("bounds", "loss", "next_stage", "value", "reason"), GATES)
def test_a_gate(bounds: dict[str, str], loss: float | None, next_stage: str | None, value: str, reason: str) -> None:
    world = run_up_to_the_gate(gate(**bounds), loss)
    condition = world.status.condition(ConditionType.GATES_PASSED)
    assert condition is not None
    assert (condition.status, condition.reason) == (value, reason)
    assert world.started[-1].document.stage == (next_stage or "alignment")
    result = world.stage("alignment").gate_result
    assert result is not None
    assert result.passed == (value == "True")
    assert result.message in condition.message or result.passed
    assert world.status.is_true(ConditionType.FAILED) == (next_stage is None and "onFail" not in bounds)


def test_a_gate_says_what_it_wants() -> None:
    world = run_up_to_the_gate(gate(atMost="2.1", onFail="Pause"))
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
def test_a_raised_gate_opens(on_fail: str) -> None:
    world = run_up_to_the_gate(gate(atMost="2.1", onFail=on_fail))
    world.spec, world.generation = gate(atMost="3", onFail=on_fail), 2
    finish(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)
    assert [a.document.stage for a in world.started] == ["curate", "alignment", "knowledge", "evaluate"]


def test_the_last_stage_s_gate_counts_for_the_run() -> None:
    stages = copy.deepcopy(SPEC["stages"][:1])
    stages[0]["gate"] = {"metric": "kept", "atLeast": "10"}
    world = World(spec={"stages": stages})
    world.succeed(settled(world), metrics={"kept": 3})
    world.settle()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "GateFailed")


def test_a_deadline_ends_the_run_and_a_later_one_lets_it_go_on() -> None:
    world = World(spec={"activeDeadlineSeconds": 600}, is_patient=False)
    world.settle()
    world.now += 599
    world.settle()
    assert world.status.is_true(ConditionType.RUNNING)
    world.now += 2
    world.settle()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "DeadlineExceeded")
    assert world.jobs == {}, "its workers don't go on"
    world.spec, world.generation = {"activeDeadlineSeconds": 6000}, 2
    assert settled(world).attempt == 2
    assert not world.status.is_true(ConditionType.FAILED)


def test_suspended_time_is_no_active_time() -> None:
    world = World(spec={"activeDeadlineSeconds": 600, "suspend": True}, is_patient=False)
    world.settle()
    world.now += 10_000
    world.spec = {"activeDeadlineSeconds": 600}
    world.settle()
    assert world.status.is_true(ConditionType.RUNNING)


def test_a_finished_run_goes_when_its_time_has_come() -> None:
    world = World(spec={"ttlSecondsAfterFinished": 60})
    finish(world)
    assert not world.is_deleted
    world.now += 61
    world.step()
    assert world.is_deleted


def restart(world: World, stage: str) -> None:
    """A person annotates the run; the operator takes the annotation off again."""
    world.restart_stage = stage
    world.settle()
    assert world.restart_stage == ""
    assert world.status.observed_restart_request == ""


def test_a_person_starts_a_failed_stage_again() -> None:
    world = World()
    world.settle()
    world.end(0, 64, message="unknown preset")
    world.settle()
    assert world.status.is_true(ConditionType.FAILED)
    restart(world, "curate")
    curate = world.stage("curate")
    assert (curate.state, curate.attempt, curate.counted_restarts) == ("Running", 2, {})
    assert not world.status.is_true(ConditionType.FAILED)
    finish(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_a_person_starts_a_running_stage_again() -> None:
    world = World()
    world.settle()
    restart(world, "curate")
    assert (world.stage("curate").attempt, [j.attempt for j in world.jobs.values()]) == (2, [2])
    restart(world, "curate")
    assert world.stage("curate").attempt == 3


REFUSED = [
    pytest.param("nonsense", "there is no stage 'nonsense'; stages are curate, alignment", id="unknown"),
    pytest.param("evaluate", "stage evaluate has not started", id="not begun"),
]


@pytest.mark.parametrize(("stage", "words"), REFUSED)
def test_what_can_t_be_started_again_is_said(stage: str, words: str) -> None:
    world = World()
    world.settle()
    restart(world, stage)
    assert words in world.events[-1].message
    assert world.stage("curate").attempt == 1


def test_a_run_that_is_over_tells_why_it_stays_so() -> None:
    world = World()
    finish(world)
    restart(world, "curate")
    assert "has its result" in world.events[-1].message
    assert world.status.is_true(ConditionType.SUCCEEDED)


def fail_at(world: World, *, saved: int, code: int = 1) -> None:
    """The active training attempt says where it is, and crashes."""
    active = settled(world)
    progress = Progress(
        attempt=active.attempt,
        phase="running",
        step=saved + 5,
        lost_steps=5 * (active.attempt - 1),
        checkpoint=Checkpoint(step=saved, path=f"c/{saved}"),
    )
    world.progress[active.name, active.attempt] = progress
    for pod in [p for p in world.pods.values() if p.terminated is None]:
        world.end(pod.index, code)
    world.settle()


TRAINING: dict[str, Any] = {"stages": SPEC["stages"][2:3], "restartPolicy": {"maxRestarts": 2}}


def test_budgets_refill_when_more_is_saved() -> None:
    world = World(spec=TRAINING)
    for saved in (10, 10, 20, 20, 30):
        fail_at(world, saved=saved)
    knowledge = world.stage("knowledge")
    assert (knowledge.restarts, knowledge.counted_restarts) == ({"Crash": 5}, {"Crash": 1})
    assert not world.status.is_true(ConditionType.FAILED)


def test_budgets_don_t_refill_with_time() -> None:
    world = World(spec=TRAINING)
    for saved in (10, 10):
        fail_at(world, saved=saved)
        world.now += 1_000_000
    fail_at(world, saved=10)
    assert world.status.is_true(ConditionType.FAILED)
    assert world.status.goodput.lost_steps == 10, "those of the last attempt may be gone on from yet"


def test_a_node_that_fails_often_is_avoided_and_named() -> None:
    world = World(spec=TRAINING | {"restartPolicy": {"maxFailuresPerNode": 2}})
    for saved in (10, 20):
        fail_at(world, saved=saved, code=139)
    world.settle()
    assert world.started[-1].excluded_nodes == ("node-0",)
    told = next(e for e in world.events if e.reason == "NodeExcluded")
    assert told.message.startswith("Node node-0 caused 2 failures of stage knowledge and is excluded")


def test_where_the_others_don_t_suffice_an_avoided_node_counts_again() -> None:
    spec = TRAINING | {"restartPolicy": {"maxFailuresPerNode": 1, "startTimeoutSeconds": 60}}
    world = World(spec=spec)
    fail_at(world, saved=10, code=139)
    world.is_patient = False
    world.now += 100
    world.step()
    assert world.started[-1].excluded_nodes == ("node-0",)
    world.hold(phase="Pending", is_ready=False, unschedulable="0/2 nodes are available")
    world.now += 1000
    world.settle()
    assert world.stage("knowledge").node_failures == {}
    assert world.started[-1].excluded_nodes == ()


QUEUED: dict[str, Any] = {
    "stages": SPEC["stages"][2:3],
    "workers": {"nodes": 2, "gpusPerNode": 0, "queueName": "team"},
}


def queue(world: World, *, admits: bool) -> None:
    """Kueue lets the newest Job go, or takes its place back."""
    job = max(world.jobs.values(), key=lambda j: j.attempt)
    world.jobs[job.name] = replace(job, is_suspended=not admits, started=world.now)
    if admits:
        world.add_pods(job)
        return
    world.pods = {n: replace(p, is_gone=True, terminated=build_end(75)) for n, p in world.pods.items()}


def test_a_queue_lets_go_takes_back_and_lets_go_again() -> None:
    world = World(spec=QUEUED, is_patient=False)
    world.settle()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.reason, stuck.message) == ("Queued", "stage knowledge waits in Kueue's queue team")
    world.now += 5000
    world.settle()
    assert world.stage("knowledge").attempt == 1, "no start timeout runs in a queue"
    queue(world, admits=True)
    assert settled(world).state == "Running"
    queue(world, admits=False)
    again = settled(world)
    assert (again.state, again.attempt, again.restarts) == ("Restarting", 2, {"Preempted": 1})
    queue(world, admits=True)
    assert settled(world).state == "Running"
    assert world.status.goodput.seconds["queued"] == 5000


def test_suspending_a_queued_run_takes_its_job_away() -> None:
    world = World(spec=QUEUED)
    world.settle()
    queue(world, admits=True)
    world.settle()
    world.spec = QUEUED | {"suspend": True}
    world.settle()
    assert (world.stage("knowledge").state, world.jobs) == ("Suspended", {})
    world.spec = QUEUED
    world.settle()
    assert [j.attempt for j in world.jobs.values()] == [2]


WORDS = [
    pytest.param('pods "x" is forbidden: exceeded quota: gpus, requested: 8', "QuotaExceeded", id="quota"),
    pytest.param('admission webhook "policy.example.com" denied the request: no', "AdmissionDenied", id="webhook"),
    pytest.param('pods "x" is forbidden: violates PodSecurity "restricted"', "AdmissionDenied", id="pod security"),
    pytest.param("pod x: FailedMount: MountVolume.SetUp failed for volume", "VolumeNotReady", id="volume"),
    pytest.param("Job demo-a-1 exists and isn't this run's; delete it or rename the run", "NameConflict", id="name"),
    pytest.param("jobs.batch is forbidden: User cannot create resource", "Forbidden", id="rights"),
    pytest.param("Job.batch is invalid: spec.template", "Rejected", id="anything else"),
]


@pytest.mark.parametrize(("words", "reason"), WORDS)
def test_stuck_in_the_words_of_who_holds_it_back(words: str, reason: str) -> None:
    world = World(is_patient=False)
    world.step()
    world.wait_reasons["curate", 1] = words
    world.step()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason, stuck.message) == ("True", reason, words)
    world.wait_reasons.clear()
    world.settle()
    assert not world.status.is_true(ConditionType.STUCK)


def test_a_failed_run_stops_its_other_branches_and_can_go_on() -> None:
    curate = SPEC["stages"][0]
    world = World(spec={"stages": [curate | {"name": "left"}, curate | {"name": "right", "dependsOn": []}]})
    world.settle()
    world.end(0, 64)
    world.settle()
    assert {s.name: s.state for s in world.status.stages} == {"left": "Failed", "right": "Suspended"}
    assert world.jobs == {}
    restart(world, "left")
    assert {s.name: (s.state, s.attempt) for s in world.status.stages} == {
        "left": ("Running", 2),
        "right": ("Running", 2),
    }


def test_the_cost_of_gpus() -> None:
    spec = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 8}, "pricePerGpuHour": "2.50"}
    world = World(spec=spec, is_patient=False)
    world.settle()
    world.now += 3600
    fail_at(world, saved=0)
    assert (world.status.goodput.cost, world.status.goodput.lost_cost) == ("40.00", "40.00")


def test_a_run_let_go_on_before_its_suspension_was_noted() -> None:
    world = World(is_patient=False)
    world.settle()
    job = next(iter(world.jobs.values()))
    world.jobs[job.name], world.pods = replace(job, is_suspended=True), {}
    assert settled(world).attempt == 2
    assert [(j.attempt, j.is_suspended) for j in world.jobs.values()] == [(2, False)]


def test_lost_results_use_the_budget_up() -> None:
    world = World(spec={"restartPolicy": {"maxInfraRestarts": 2}})
    while not world.status.is_true(ConditionType.FAILED):
        if world.settle() is not None:
            for pod in [p for p in world.pods.values() if p.terminated is None]:
                world.end(pod.index, 0)
    assert len(world.started) == 3


def test_a_job_removed_before_its_pods_were_seen_is_not_made_again() -> None:
    world = World(is_patient=False)
    world.step()
    (job,) = world.jobs.values()
    world.jobs, world.pods = {job.name: replace(job, is_gone=True)}, {}
    assert settled(world).attempt == 2
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_a_first_job_made_before_a_suspension_is_taken_into_it() -> None:
    world = World(is_patient=False)
    world.step()
    world.status = Status()  # the operator died before its note
    world.spec = {"suspend": True}
    world.settle()
    assert [j.is_suspended for j in world.jobs.values()] == [True]


def test_a_refusal_shows_also_while_workers_run() -> None:
    world = World(is_patient=False)
    world.settle()
    world.refusals["curate", 1] = "Service demo exists and isn't this run's; delete it or rename the run"
    world.settle()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "NameConflict")


def test_a_finished_run_notes_the_generation_that_it_has_seen() -> None:
    world = World()
    finish(world)
    world.generation = 7
    world.settle()
    assert world.status.observed_generation == 7
