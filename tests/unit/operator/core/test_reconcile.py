"""Whole runs through the pure core: a small world carries decisions out, and the tests look at where it ends."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import Cause, ConditionType, Reason, Status, decode_status, encode_status
from sailvl_operator.core.plan import plan
from sailvl_trainer.contract import WATCHDOG_INTERVAL_SECONDS, Checkpoint, Progress
from tests.support.builders.operator import SPEC, build_end, build_run
from tests.support.core_world import DEFAULTS, World, finish


def test_a_run_goes_through_its_stages_in_order() -> None:
    world = World()
    finish(world)
    assert [a.document.stage for a in world.started] == ["curate", "alignment", "knowledge", "evaluate"]
    assert world.status.is_true(ConditionType.SUCCEEDED)
    assert world.status.completion_time
    assert world.events[-1].reason == Reason.COMPLETED


def test_what_a_stage_reads_comes_from_where_it_was_found() -> None:
    world = World()
    finish(world)
    alignment, knowledge = world.started[1].document, world.started[2].document
    assert alignment.train is not None
    assert alignment.train.data == ("/data/demo/curate-found",)
    assert alignment.init_from is None
    assert knowledge.init_from == "/data/demo/alignment-found"
    assert world.started[3].document.init_from == "/data/demo/knowledge-found"


def test_a_finished_run_is_left_alone_when_its_children_are_cleaned_up() -> None:
    world = World()
    finish(world)
    world.jobs.clear()
    world.pods.clear()
    assert not world.step()


def test_a_crash_is_followed_by_the_next_attempt_after_a_wait() -> None:
    world = World()
    world.settle()
    world.end(0, 1, rank=0, message="boom")
    before = world.now
    world.settle()
    waiting = world.stage("curate")
    assert (waiting.state, waiting.attempt, waiting.restarts) == ("Restarting", 2, {"Crash": 1})
    assert waiting.last_failure is not None
    assert waiting.last_failure.message == "boom"
    world.settle()
    assert world.now >= before + DEFAULTS.backoff_seconds
    assert [j.attempt for j in world.jobs.values()] == [2]


def test_budgets_end_a_run() -> None:
    world = World(spec={"restartPolicy": {"maxRestarts": 2}})
    while not world.status.is_true(ConditionType.FAILED):
        if world.settle() is not None and any(p.terminated is None for p in world.pods.values()):
            world.end(0, 1)
    assert len(world.started) == 3
    assert world.stage("curate").state == "Failed"
    assert not world.jobs or world.step() is True


CAUSES = [
    pytest.param(64, 1, Cause.CONFIG, id="a bad setting fails at once"),
    pytest.param(65, 1, Cause.DATA, id="a bad record fails at once"),
    pytest.param(67, 2, Cause.OUT_OF_MEMORY, id="memory: one more try"),
    pytest.param(66, 4, Cause.NON_FINITE, id="not a number: three more tries"),
]


@pytest.mark.parametrize(("code", "attempts", "cause"), CAUSES)
def test_each_cause_has_its_budget(code: int, attempts: int, cause: Cause) -> None:
    world = World()
    while not world.status.is_true(ConditionType.FAILED):
        if world.settle() is not None and any(p.terminated is None for p in world.pods.values()):
            world.end(0, code)
    assert len(world.started) == attempts
    last = world.stage("curate").last_failure
    assert last is not None
    assert last.cause == cause


def test_one_dead_worker_of_two_waits_for_the_others_word() -> None:
    world = World(spec={"stages": SPEC["stages"][2:]})
    world.settle()
    world.end(1, 76)
    world.step()
    assert world.stage("knowledge").attempt == 1, "a lost peer's word is not the cause; its neighbour may still tell"
    world.end(0, 137)
    world.step()
    last = world.stage("knowledge").last_failure
    assert last is not None
    assert (last.cause, last.node) == (Cause.CRASH, "node-0")


def test_a_worker_that_fell_silent_is_named_not_the_one_that_lost_it() -> None:
    """Its machine has lost power; the API server doesn't know yet."""
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.settle()
    world.end(0, 76, message="another rank is gone")
    world.settle()  # the other may have a word to say
    world.settle()
    stage = world.stage("knowledge")
    assert stage.last_failure is not None
    assert (stage.last_failure.cause, stage.last_failure.node) == ("Infra", "node-1")
    assert stage.last_failure.message == (
        "worker 1 (node node-1) stopped responding; worker 0 (node node-0) reported: another rank is gone"
    )
    assert stage.node_failures == {"node-1": 1}
    assert world.started[-1].suspect_nodes == ("node-1",)


def test_a_stall_waits_for_the_other_watchdog() -> None:
    """Two workers that hang end within seconds of each other; the first alone would have its machine blamed."""
    world = World(spec={"stages": SPEC["stages"][2:3]}, is_patient=False)
    world.settle()
    world.end(0, 68, message="no progress for 900 s")
    world.now += WATCHDOG_INTERVAL_SECONDS
    world.settle()
    assert world.stage("knowledge").attempt == 1
    world.end(1, 68, message="no progress for 900 s")
    world.settle()
    stage = world.stage("knowledge")
    assert (stage.attempt, stage.restarts, stage.node_failures) == (2, {"Stalled": 1}, {})


def test_where_all_have_lost_each_other_no_machine_is_named() -> None:
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.settle()
    for index in range(2):
        world.end(index, 76, message="another rank is gone")
    world.settle()
    stage = world.stage("knowledge")
    assert stage.last_failure is not None
    assert (stage.last_failure.node, stage.last_failure.exit_code, stage.node_failures) == ("", 76, {})


def test_suspend_ends_the_workers_and_resume_is_a_new_attempt() -> None:
    world = World()
    world.settle()
    world.spec = {"suspend": True}
    world.settle()
    assert [j.is_suspended for j in world.jobs.values()] == [True]
    for pod in list(world.pods.values()):
        world.pods[pod.name] = replace(pod, is_gone=True, terminated=build_end(75))
    world.settle()
    assert world.stage("curate").state == "Suspended"
    assert world.status.is_true(ConditionType.SUSPENDED)
    world.spec = {}
    world.settle()
    curate = world.stage("curate")
    assert (curate.attempt, curate.state, curate.restarts) == (2, "Running", {})


def test_an_appended_stage_runs_after_the_end() -> None:
    world = World()
    finish(world)
    more = {"name": "more", "sft": {"data": [{"path": "/data/sft/more"}], "epochs": "1"}}
    world.spec, world.generation = {"stages": [*SPEC["stages"], more]}, 2
    finish(world)
    assert world.started[-1].document.stage == "more"
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_what_is_not_built_yet_is_refused_and_a_mended_spec_goes_on() -> None:
    world = World(spec={"engine": {"name": "fsdp2"}})
    world.settle()
    failed = world.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "InvalidSpec")
    assert failed.message == "spec.engine.name: fsdp2 is not supported yet; set it to deepspeed"
    world.spec, world.generation = {}, 2
    finish(world)
    assert world.status.is_true(ConditionType.SUCCEEDED)


def test_pods_that_wait_are_named() -> None:
    world = World()
    world.step()
    (name,) = world.pods
    words = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    world.pods[name] = replace(world.pods[name], phase="Pending", is_ready=False, unschedulable=words)
    assert not world.step(), "it may get a node yet"
    world.step()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "Unschedulable")
    assert words in stuck.message
    assert world.status.summary.reason == "Unschedulable"


def test_pods_that_never_run_make_room() -> None:
    world = World(spec={"restartPolicy": {"startTimeoutSeconds": 60}})
    world.step()
    (name,) = world.pods
    world.pods[name] = replace(world.pods[name], phase="Pending", is_ready=False)
    world.settle()
    world.settle()
    curate = world.stage("curate")
    assert (curate.attempt, curate.restarts) == (2, {"Infra": 1})


def test_a_removed_job_is_replaced() -> None:
    world = World()
    world.settle()
    world.jobs.clear()
    world.pods = {n: replace(p, is_gone=True) for n, p in world.pods.items()}
    world.settle()
    assert world.stage("curate").restarts == {"Infra": 1}
    assert world.stage("curate").state == "Running"


def test_peers_that_vanished_before_they_were_seen() -> None:
    """The operator was away while they ran: one is done, and the pods of the others are no more."""
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.step()
    first, other = world.pods
    world.pods[first] = replace(world.pods[first], terminated=build_end(0), ended_seen=world.now)
    del world.pods[other]
    world.settle()
    assert world.stage("knowledge").attempt == 1, "the other may only be on its way"
    world.now += 900
    world.settle()
    last = world.stage("knowledge").last_failure
    assert last is not None
    assert (last.cause, last.message) == ("Infra", "pod 1 was deleted externally")


def test_pods_that_a_first_job_left_are_an_attempt() -> None:
    """The operator died before its note, and the Job was removed while it was away."""
    world = World(spec={"restartPolicy": {"startTimeoutSeconds": 0}})
    world.step()
    world.status, world.jobs = Status(), {}
    world.settle()
    assert [a.document.attempt for a in world.started] == [1]
    world.hold(is_gone=True)
    assert world.stage("curate").restarts == {"Infra": 1}
    assert [a.document.attempt for a in world.started] == [1, 2]


def test_workers_that_run_before_a_status_told_of_their_start_take_one_write() -> None:
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.step()
    world.status, world.events = Status(), []  # where many runs start at once, the write was put off
    world.step()
    stage = world.stage("knowledge")
    assert (stage.state, stage.attempt, stage.digest) == ("Running", 1, world.started[0].document.digest)
    assert world.status.summary.ready == "2/2"
    assert [event.reason for event in world.events] == [Reason.STAGE_STARTED]
    assert not world.step()


def test_what_has_failed_before_a_status_told_of_its_start_takes_two() -> None:
    """A later attempt's number needs a status that tells of the one before."""
    world = World(spec={"stages": SPEC["stages"][2:3]})
    world.step()
    world.status = Status()
    for index in range(2):
        world.end(index, 1, message="boom")
    states = []
    for _ in range(2):
        world.step()
        states.append((world.stage("knowledge").state, world.stage("knowledge").attempt))
    assert states == [("Starting", 1), ("Restarting", 2)]


def test_nothing_changed_nothing_written() -> None:
    world = World()
    world.settle()
    assert not world.step()
    assert decode_status(encode_status(world.status)) == world.status


def test_progress_alone_is_written_now_and_then() -> None:
    world = World(spec={"stages": SPEC["stages"][2:3]}, is_patient=False)
    world.settle()

    def tell(step: int, saved: int) -> bool:
        checkpoint = Checkpoint(step=saved, path=f"c/{saved}")
        world.progress["knowledge", 1] = Progress(attempt=1, phase="running", step=step, checkpoint=checkpoint)
        return world.step()

    world.now += 1
    assert tell(1, saved=1), "a checkpoint is told at once"
    world.now += DEFAULTS.progress_seconds - 1
    assert not tell(2, saved=1)
    world.now += 1
    assert tell(3, saved=1)
    assert world.stage("knowledge").progress.step == 3


Change = Callable[[dict[str, object]], dict[str, object]]
DIGESTS = [
    pytest.param({"workers": {"nodes": 8, "gpusPerNode": 0}}, True, id="where it runs does not count"),
    pytest.param({"image": "other"}, True, id="nor does the image"),
    pytest.param({"seed": 7}, False, id="the seed counts"),
    pytest.param({"model": {"preset": "sail-vl-2b"}}, False, id="the model counts"),
]


@pytest.mark.parametrize(("change", "is_same"), DIGESTS)
def test_the_digest_covers_what_changes_the_result(change: dict[str, object], is_same: bool) -> None:
    old, new = plan(build_run()), plan(build_run(**change))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [is_same] * 4


def test_curation_is_the_same_whatever_sees_its_pictures_later() -> None:
    old, new = plan(build_run()), plan(build_run(model={"preset": "tiny", "vision": "/data/models/other"}))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [True, False, False, False]


def test_digests_of_trainings_are_those_of_the_first_version() -> None:
    """Their results are found again after an upgrade."""
    planned = plan(build_run(model={"preset": "tiny", "vision": "/data/models/other"}))
    assert [stage.digest[:12] for stage in planned[1:]] == ["461eaea8607f", "c481e3330fb5", "07faa3a8efeb"]


def test_a_changed_stage_changes_what_hangs_on_it() -> None:
    changed = msgspec.json.decode(msgspec.json.encode(SPEC["stages"]))
    changed[1]["pretrain"]["tokens"] = "64K"
    old, new = plan(build_run()), plan(build_run(stages=changed))
    assert [a.digest == b.digest for a, b in zip(old, new, strict=True)] == [True, False, False, False]
