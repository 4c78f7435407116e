"""Tests of reconcile: a simulated world applies decisions, and the tests check where the run ends."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import Cause, ConditionType, Reason, Status, decode_status, encode_status
from sailvl_operator.core.observe import observe
from sailvl_operator.core.plan import plan
from sailvl_trainer.contract import WATCHDOG_INTERVAL_SECONDS, Checkpoint, Progress
from tests.support.builders.operator import SPEC, build_end, build_job, build_run
from tests.support.core_world import DEFAULTS, CoreWorld, finish_run


def test_stages_run_in_order() -> None:
    world = CoreWorld()
    finish_run(world)
    assert [a.document.stage for a in world.started] == ["curate", "alignment", "knowledge", "evaluate"]
    assert world.status.is_true(ConditionType.SUCCEEDED)
    assert world.status.completion_time
    assert world.events[-1].reason == Reason.COMPLETED


def test_stage_reads_the_outputs_of_earlier_stages() -> None:
    world = CoreWorld()
    finish_run(world)
    alignment, knowledge = world.started[1].document, world.started[2].document
    assert alignment.train is not None
    assert alignment.train.data == ("/data/demo/curate-found",)
    assert alignment.init_from is None
    assert knowledge.init_from == "/data/demo/alignment-found"
    assert world.started[3].document.init_from == "/data/demo/knowledge-found"


def test_finished_run_ignores_the_deletion_of_its_objects() -> None:
    world = CoreWorld()
    finish_run(world)
    world.jobs.clear()
    world.pods.clear()
    assert not world.reconcile_once()


def test_crash_is_followed_by_a_new_attempt_after_the_backoff() -> None:
    world = CoreWorld()
    world.run_until_stable()
    world.end_worker(0, 1, rank=0, message="boom")
    before = world.now
    world.run_until_stable()
    waiting = world.stage("curate")
    assert (waiting.state, waiting.attempt, waiting.restarts) == ("Restarting", 2, {"Crash": 1})
    assert waiting.last_failure is not None
    assert waiting.last_failure.message == "boom"
    world.run_until_stable()
    assert world.now >= before + DEFAULTS.backoff_seconds
    assert [j.attempt for j in world.jobs.values()] == [2]


def test_used_up_budget_fails_the_run() -> None:
    world = CoreWorld(spec={"restartPolicy": {"maxRestarts": 2}})
    while not world.status.is_true(ConditionType.FAILED):
        if world.run_until_stable() is not None and any(p.terminated is None for p in world.pods.values()):
            world.end_worker(0, 1)
    assert len(world.started) == 3
    assert world.stage("curate").state == "Failed"
    assert not world.jobs or world.reconcile_once() is True


CAUSES = [
    pytest.param(64, 1, Cause.CONFIG, id="invalid setting: no restart"),
    pytest.param(65, 1, Cause.DATA, id="invalid record: no restart"),
    pytest.param(67, 2, Cause.OUT_OF_MEMORY, id="out of memory: one restart"),
    pytest.param(66, 4, Cause.NON_FINITE, id="non-finite: three restarts"),
]


@pytest.mark.parametrize(("code", "attempts", "cause"), CAUSES)
def test_each_cause_has_its_own_budget(code: int, attempts: int, cause: Cause) -> None:
    world = CoreWorld()
    while not world.status.is_true(ConditionType.FAILED):
        if world.run_until_stable() is not None and any(p.terminated is None for p in world.pods.values()):
            world.end_worker(0, code)
    assert len(world.started) == attempts
    last = world.stage("curate").last_failure
    assert last is not None
    assert last.cause == cause


def test_lost_peer_waits_for_the_other_workers_evidence() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:]})
    world.run_until_stable()
    world.end_worker(1, 76)
    world.reconcile_once()
    assert world.stage("knowledge").attempt == 1, "a lost peer is not the cause; the other worker may still report it"
    world.end_worker(0, 137)
    world.reconcile_once()
    last = world.stage("knowledge").last_failure
    assert last is not None
    assert (last.cause, last.node) == (Cause.CRASH, "node-0")


def test_silent_worker_is_named_as_the_cause_of_a_lost_peer() -> None:
    """The node has lost power, and the API server hasn't noticed yet."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.run_until_stable()
    world.end_worker(0, 76, message="another rank is gone")
    world.run_until_stable()  # the other worker may still report a cause
    world.run_until_stable()
    stage = world.stage("knowledge")
    assert stage.last_failure is not None
    assert (stage.last_failure.cause, stage.last_failure.node) == ("Infra", "node-1")
    assert stage.last_failure.message == (
        "worker 1 (node node-1) stopped responding; worker 0 (node node-0) reported: another rank is gone"
    )
    assert stage.node_failures == {"node-1": 1}
    assert world.started[-1].suspect_nodes == ("node-1",)


def test_stall_waits_for_the_watchdogs_of_other_workers() -> None:
    """Stalled workers exit within seconds of each other; after the first alone, its node would be suspected."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]}, advances_time=False)
    world.run_until_stable()
    world.end_worker(0, 68, message="no progress for 900 s")
    world.now += WATCHDOG_INTERVAL_SECONDS
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 1
    world.end_worker(1, 68, message="no progress for 900 s")
    world.run_until_stable()
    stage = world.stage("knowledge")
    assert (stage.attempt, stage.restarts, stage.node_failures) == (2, {"Stalled": 1}, {})


def test_no_node_is_suspected_if_all_workers_lost_a_peer() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.run_until_stable()
    for index in range(2):
        world.end_worker(index, 76, message="another rank is gone")
    world.run_until_stable()
    stage = world.stage("knowledge")
    assert stage.last_failure is not None
    assert (stage.last_failure.node, stage.last_failure.exit_code, stage.node_failures) == ("", 76, {})


def test_suspend_stops_the_workers_and_resume_starts_a_new_attempt() -> None:
    world = CoreWorld()
    world.run_until_stable()
    world.spec = {"suspend": True}
    world.run_until_stable()
    assert [j.is_suspended for j in world.jobs.values()] == [True]
    for pod in list(world.pods.values()):
        world.pods[pod.name] = replace(pod, is_gone=True, terminated=build_end(75))
    world.run_until_stable()
    assert world.stage("curate").state == "Suspended"
    assert world.status.is_true(ConditionType.SUSPENDED)
    world.spec = {}
    world.run_until_stable()
    curate = world.stage("curate")
    assert (curate.attempt, curate.state, curate.restarts) == (2, "Running", {})


def test_appended_stage_resumes_a_succeeded_run() -> None:
    world = CoreWorld()
    finish_run(world)
    more = {"name": "more", "sft": {"data": [{"path": "/data/sft/more"}], "epochs": "1"}}
    world.spec, world.generation = {"stages": [*SPEC["stages"], more]}, 2
    finish_run(world)
    assert world.started[-1].document.stage == "more"
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_unsupported_spec_fails_the_run_until_it_is_fixed() -> None:
    world = CoreWorld(spec={"engine": {"name": "fsdp2"}})
    world.run_until_stable()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "InvalidSpec")
    assert failed.message == "spec.engine.name: fsdp2 is not supported yet; set it to deepspeed"
    world.spec, world.generation = {}, 2
    finish_run(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_unschedulable_pod_is_reported_after_a_grace_period() -> None:
    world = CoreWorld()
    world.reconcile_once()
    (name,) = world.pods
    message = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    world.pods[name] = replace(world.pods[name], phase="Pending", is_ready=False, unschedulable=message)
    assert not world.reconcile_once(), "it may still get a node"
    world.reconcile_once()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "Unschedulable")
    assert message in stuck.message
    assert world.status.summary.reason == "Unschedulable"


def test_start_timeout_restarts_the_attempt() -> None:
    world = CoreWorld(spec={"restartPolicy": {"startTimeoutSeconds": 60}})
    world.reconcile_once()
    (name,) = world.pods
    world.pods[name] = replace(world.pods[name], phase="Pending", is_ready=False)
    world.run_until_stable()
    world.run_until_stable()
    curate = world.stage("curate")
    assert (curate.attempt, curate.restarts) == (2, {"Infra": 1})


def test_externally_deleted_job_starts_a_new_attempt() -> None:
    world = CoreWorld()
    world.run_until_stable()
    world.jobs.clear()
    world.pods = {n: replace(p, is_gone=True) for n, p in world.pods.items()}
    world.run_until_stable()
    assert world.stage("curate").restarts == {"Infra": 1}
    assert world.stage("curate").state == "Running"


def test_pod_that_vanished_unobserved_fails_the_attempt_after_the_start_timeout() -> None:
    """The operator was down meanwhile: one pod has succeeded, and the others are gone."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.reconcile_once()
    first, other = world.pods
    world.pods[first] = replace(world.pods[first], terminated=build_end(0), ended_seen=world.now)
    del world.pods[other]
    world.run_until_stable()
    assert world.stage("knowledge").attempt == 1, "the other pod may still be created"
    world.now += 900
    world.run_until_stable()
    last = world.stage("knowledge").last_failure
    assert last is not None
    assert (last.cause, last.message) == ("Infra", "pod 1 was deleted externally")


def test_pods_of_a_deleted_first_job_count_as_an_attempt() -> None:
    """The operator died before it wrote the status, and the Job was deleted while it was down."""
    world = CoreWorld(spec={"restartPolicy": {"startTimeoutSeconds": 0}})
    world.reconcile_once()
    world.status, world.jobs = Status(), {}
    world.run_until_stable()
    assert [a.document.attempt for a in world.started] == [1]
    world.update_pods(is_gone=True)
    assert world.stage("curate").restarts == {"Infra": 1}
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_start_and_running_state_take_one_write() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.reconcile_once()
    world.status, world.events = Status(), []  # under backpressure the write was deferred
    world.reconcile_once()
    stage = world.stage("knowledge")
    assert (stage.state, stage.attempt, stage.digest) == ("Running", 1, world.started[0].document.digest)
    assert world.status.summary.ready == "2/2"
    assert [event.reason for event in world.events] == [Reason.STAGE_STARTED]
    assert not world.reconcile_once()


def test_start_and_failure_take_two_writes() -> None:
    """The number of a later attempt may be written only after the first attempt was."""
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]})
    world.reconcile_once()
    world.status = Status()
    for index in range(2):
        world.end_worker(index, 1, message="boom")
    states = []
    for _ in range(2):
        world.reconcile_once()
        states.append((world.stage("knowledge").state, world.stage("knowledge").attempt))
    assert states == [("Starting", 1), ("Restarting", 2)]


def test_unchanged_run_is_not_written() -> None:
    world = CoreWorld()
    world.run_until_stable()
    assert not world.reconcile_once()
    assert decode_status(encode_status(world.status)) == world.status


def test_progress_writes_are_throttled() -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]}, advances_time=False)
    world.run_until_stable()

    def report(step: int, saved: int) -> bool:
        checkpoint = Checkpoint(step=saved, path=f"c/{saved}")
        world.progress["knowledge", 1] = Progress(attempt=1, phase="running", step=step, checkpoint=checkpoint)
        return world.reconcile_once()

    world.now += 1
    assert report(1, saved=1), "a checkpoint is written at once"
    world.now += DEFAULTS.progress_seconds - 1
    assert not report(2, saved=1)
    world.now += 1
    assert report(3, saved=1)
    assert world.stage("knowledge").progress.step == 3


Change = Callable[[dict[str, object]], dict[str, object]]
DIGESTS = [
    pytest.param({"workers": {"nodes": 8, "gpusPerNode": 0}}, True, id="workers don't count"),
    pytest.param({"image": "other"}, True, id="the image doesn't count"),
    pytest.param({"seed": 7}, False, id="the seed counts"),
    pytest.param({"model": {"preset": "sail-vl-2b"}}, False, id="the model counts"),
]


@pytest.mark.parametrize(("change", "is_same"), DIGESTS)
def test_digest_covers_settings_that_change_the_result(change: dict[str, object], is_same: bool) -> None:
    old, new = plan(build_run()), plan(build_run(**change))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [is_same] * 4


def test_digest_of_curation_ignores_the_vision_tower() -> None:
    old, new = plan(build_run()), plan(build_run(model={"preset": "tiny", "vision": "/data/models/other"}))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [True, False, False, False]


def test_digests_of_training_stages_are_stable_between_versions() -> None:
    """Results from before an upgrade are still found."""
    planned = plan(build_run(model={"preset": "tiny", "vision": "/data/models/other"}))
    assert [stage.digest[:12] for stage in planned[1:]] == ["461eaea8607f", "c481e3330fb5", "07faa3a8efeb"]


def test_changed_stage_changes_digests_of_dependent_stages() -> None:
    changed = msgspec.json.decode(msgspec.json.encode(SPEC["stages"]))
    changed[1]["pretrain"]["tokens"] = "64K"
    old, new = plan(build_run()), plan(build_run(stages=changed))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("is_gone_first", [True, False])
def test_existing_job_counts_and_a_deleted_one_of_the_same_attempt_does_not(is_gone_first: bool) -> None:
    """After a relist the stores may hold both: the deleted Job and the one that replaced it under the same name."""
    jobs = [build_job("curate", uid="new"), build_job("curate", uid="old", is_gone=True)]
    observed = observe(reversed(jobs) if is_gone_first else jobs)
    attempt = observed.attempts["curate", 1]
    assert attempt.job is not None
    assert (attempt.job.uid, attempt.gone_job) == ("new", None)


@pytest.mark.parametrize(
    ("known", "reported", "is_reused", "expected"),
    [(7, 3, False, 7), (3, 7, False, 7), (7, 90, True, 7)],
    ids=["result knows of fewer", "result knows of more", "result of an earlier run"],
)
def test_lost_steps_never_decrease_when_a_stage_succeeds(
    known: int, reported: int, is_reused: bool, expected: int
) -> None:
    world = CoreWorld(spec={"stages": SPEC["stages"][2:3]}, advances_time=False)
    stage = world.run_until_stable()
    assert stage is not None
    world.progress[stage.name, 1] = Progress(attempt=1, phase="running", step=5, steps=10, lost_steps=known)
    world.now += 60
    world.run_until_stable()
    world.succeed_stage(stage, lost_steps=reported, reused=is_reused)
    world.run_until_stable()
    progress = world.stage(stage.name).progress
    assert progress is not None
    assert progress.lost_steps == expected
