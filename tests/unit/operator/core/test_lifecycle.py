"""Tests of the run's lifecycle: gates, deadlines, restart requests, queues, budgets and the Stuck condition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType, Status
from sailvl_trainer.contract import Checkpoint, Progress
from tests.support.builders.operator import SPEC, build_end
from tests.support.core_world import CoreWorld, finish_run


def build_gated_spec(**bounds: Any) -> dict[str, Any]:
    """Return a spec with a gate on its first training stage."""
    stages = copy.deepcopy(SPEC["stages"])
    stages[1]["gate"] = {"metric": "heldOutLoss"} | bounds
    return {"stages": stages}


def run_to_gate(spec: dict[str, Any], loss: float | None = 2.4) -> CoreWorld:
    """Return a world whose gated stage has just succeeded with a held-out loss."""
    world = CoreWorld(spec=spec)
    world.succeed_stage(run_to_active_stage(world))
    alignment = run_to_active_stage(world)
    assert alignment.name == "alignment"
    world.succeed_stage(alignment, metrics={} if loss is None else {"heldOutLoss": loss})
    world.run_until_stable()
    return world


def run_to_active_stage(world: CoreWorld) -> Any:
    active = world.run_until_stable()
    assert active is not None
    return active


GATES = [
    pytest.param({"atMost": "2.5"}, 2.4, "knowledge", "True", "GatePassed", id="passes"),
    pytest.param({"atMost": "2.4"}, 2.4, "knowledge", "True", "GatePassed", id="the bound itself passes"),
    pytest.param({"atLeast": "2.5"}, 2.6, "knowledge", "True", "GatePassed", id="a lower bound"),
    pytest.param({"atMost": "2.1", "onFail": "Continue"}, 2.4, "knowledge", "False", "GateFailed", id="continues"),
    pytest.param({"atMost": "2.1", "onFail": "Pause"}, 2.4, None, "False", "GateFailed", id="pauses"),
    pytest.param({"atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="stops"),
    pytest.param({"atMost": "2.1"}, None, None, "False", "GateFailed", id="metric missing because it was not finite"),
    pytest.param({"metric": "other", "atMost": "2.1"}, 2.4, None, "False", "GateFailed", id="unknown metric"),
]


@pytest.mark.parametrize(("bounds", "loss", "next_stage", "value", "reason"), GATES)
def test_gate_decides_whether_the_next_stage_starts(
    bounds: dict[str, str], loss: float | None, next_stage: str | None, value: str, reason: str
) -> None:
    world = run_to_gate(build_gated_spec(**bounds), loss)
    condition = world.status.condition(ConditionType.GATES_PASSED)
    assert condition is not None
    assert (condition.status, condition.reason) == (value, reason)
    assert world.started[-1].document.stage == (next_stage or "alignment")
    result = world.stage("alignment").gate_result
    assert result is not None
    assert result.passed == (value == "True")
    assert result.message in condition.message or result.passed
    assert world.status.is_true(ConditionType.FAILED) == (next_stage is None and "onFail" not in bounds)


def test_paused_gate_is_reported_as_stuck() -> None:
    world = run_to_gate(build_gated_spec(atMost="2.1", onFail="Pause"))
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
def test_relaxed_gate_resumes_the_run(on_fail: str) -> None:
    world = run_to_gate(build_gated_spec(atMost="2.1", onFail=on_fail))
    world.spec, world.generation = build_gated_spec(atMost="3", onFail=on_fail), 2
    finish_run(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)
    assert [a.document.stage for a in world.started] == ["curate", "alignment", "knowledge", "evaluate"]


def test_failed_gate_of_the_last_stage_fails_the_run() -> None:
    stages = copy.deepcopy(SPEC["stages"][:1])
    stages[0]["gate"] = {"metric": "kept", "atLeast": "10"}
    world = CoreWorld(spec={"stages": stages})
    world.succeed_stage(run_to_active_stage(world), metrics={"kept": 3})
    world.run_until_stable()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "GateFailed")


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


def request_restart(world: CoreWorld, stage: str) -> None:
    """Annotate the run as a user does, and check that the operator removes the annotation."""
    world.restart_stage = stage
    world.run_until_stable()
    assert world.restart_stage == ""
    assert world.status.observed_restart_request == ""


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


@pytest.mark.parametrize(("stage", "words"), REFUSED)
def test_impossible_restart_request_is_explained(stage: str, words: str) -> None:
    world = CoreWorld()
    world.run_until_stable()
    request_restart(world, stage)
    assert words in world.events[-1].message
    assert world.stage("curate").attempt == 1


def test_restart_request_of_a_succeeded_run_is_refused() -> None:
    world = CoreWorld()
    finish_run(world)
    request_restart(world, "curate")
    assert "has its result" in world.events[-1].message
    assert world.status.is_true(ConditionType.SUCCEEDED)


def fail_attempt(world: CoreWorld, *, saved: int, code: int = 1) -> None:
    """Let the active attempt report its progress and crash."""
    active = run_to_active_stage(world)
    progress = Progress(
        attempt=active.attempt,
        phase="running",
        step=saved + 5,
        lost_steps=5 * (active.attempt - 1),
        checkpoint=Checkpoint(step=saved, path=f"c/{saved}"),
    )
    world.progress[active.name, active.attempt] = progress
    for pod in [p for p in world.pods.values() if p.terminated is None]:
        world.end_worker(pod.index, code)
    world.run_until_stable()


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


def test_node_with_many_failures_is_excluded_and_reported() -> None:
    world = CoreWorld(spec=TRAINING | {"restartPolicy": {"maxFailuresPerNode": 2}})
    for saved in (10, 20):
        fail_attempt(world, saved=saved, code=139)
    world.run_until_stable()
    assert world.started[-1].excluded_nodes == ("node-0",)
    told = next(e for e in world.events if e.reason == "NodeExcluded")
    assert told.message.startswith("Node node-0 caused 2 failures of stage knowledge and is excluded")


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


WORDS = [
    pytest.param('pods "x" is forbidden: exceeded quota: gpus, requested: 8', "QuotaExceeded", id="quota"),
    pytest.param('admission webhook "policy.example.com" denied the request: no', "AdmissionDenied", id="webhook"),
    pytest.param('pods "x" is forbidden: violates PodSecurity "restricted"', "AdmissionDenied", id="pod security"),
    pytest.param("pod x: FailedMount: MountVolume.SetUp failed for volume", "VolumeNotReady", id="volume"),
    pytest.param("Job demo-a-1 exists and isn't this run's; delete it or rename the run", "NameConflict", id="name"),
    pytest.param("jobs.batch is forbidden: User cannot create resource", "Forbidden", id="forbidden"),
    pytest.param("Job.batch is invalid: spec.template", "Rejected", id="other"),
]


@pytest.mark.parametrize(("words", "reason"), WORDS)
def test_stuck_reason_follows_from_the_message(words: str, reason: str) -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    world.wait_reasons["curate", 1] = words
    world.reconcile_once()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason, stuck.message) == ("True", reason, words)
    world.wait_reasons.clear()
    world.run_until_stable()
    assert not world.status.is_true(ConditionType.STUCK)


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


def test_cost_is_computed_from_gpu_seconds() -> None:
    spec = TRAINING | {"workers": {"nodes": 2, "gpusPerNode": 8}, "pricePerGpuHour": "2.50"}
    world = CoreWorld(spec=spec, advances_time=False)
    world.run_until_stable()
    world.now += 3600
    fail_attempt(world, saved=0)
    assert (world.status.goodput.cost, world.status.goodput.lost_cost) == ("40.00", "40.00")


def test_run_resumes_before_its_suspension_was_recorded() -> None:
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    job = next(iter(world.jobs.values()))
    world.jobs[job.name], world.pods = replace(job, is_suspended=True), {}
    assert run_to_active_stage(world).attempt == 2
    assert [(j.attempt, j.is_suspended) for j in world.jobs.values()] == [(2, False)]


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


def test_unrecorded_first_job_is_suspended_with_its_run() -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    world.status = Status()  # the operator died before it wrote the status
    world.spec = {"suspend": True}
    world.run_until_stable()
    assert [j.is_suspended for j in world.jobs.values()] == [True]


def test_refusal_is_reported_while_workers_run() -> None:
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    world.refusals["curate", 1] = "Service demo exists and isn't this run's; delete it or rename the run"
    world.run_until_stable()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "NameConflict")


def test_finished_run_records_the_observed_generation() -> None:
    world = CoreWorld()
    finish_run(world)
    world.generation = 7
    world.run_until_stable()
    assert world.status.observed_generation == 7
