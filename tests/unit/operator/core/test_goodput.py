"""Tests of goodput: every second is counted once, in the bucket of the activity at that time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl_operator.api.status import ConditionType
from sailvl_operator.core.goodput import apportion
from sailvl_trainer.contract import Checkpoint, ExitCode, Progress
from tests.support.core_world import CoreWorld, finish_run

ALIGNMENT: dict[str, Any] = {
    "workers": {"nodes": 2, "gpusPerNode": 4},
    "stages": [{"name": "alignment", "pretrain": {"train": ["connector"], "data": [{"path": "/d"}], "tokens": "32K"}}],
}


class TrainingWorld(CoreWorld):
    """A world with one training stage, whose time only the test advances."""

    def advance(self, seconds: float, *, attempt: int = 1, step: int = 0, saved: int = 0, **spent: float) -> None:
        """Advance the time; `spent` are the seconds by activity that the workers report for the whole attempt."""
        self.now += seconds
        if spent:
            self.progress["alignment", attempt] = Progress(
                attempt=attempt,
                phase="training",
                step=step,
                seconds=dict(spent),
                checkpoint=Checkpoint(step=saved, path=f"c/{saved}") if saved else None,
            )
        self.run_until_stable()

    @property
    def seconds(self) -> dict[str, int]:
        return self.status.goodput.seconds


def build_unscheduled_world() -> TrainingWorld:
    """Return a world whose pods exist but have no node yet."""
    world = TrainingWorld(spec=ALIGNMENT, advances_time=False)
    world.reconcile_once()
    world.update_pods(node="", placed=0.0, is_ready=False)
    return world


def build_running_world() -> TrainingWorld:
    """Return a world whose workers run after 10 s of queueing and 20 s of starting."""
    world = build_unscheduled_world()
    world.now += 5
    world.update_pods(unschedulable="0/2 nodes are available")
    world.now += 5
    world.update_pods(node="node-0", placed=world.now, unschedulable="")
    world.now += 20
    world.update_pods(is_ready=True)
    return world


def test_goodput_separates_queueing_from_starting() -> None:
    world = build_running_world()
    assert world.seconds == {"queued": 10, "starting": 20}
    assert world.status.goodput.gpu_seconds == {"starting": 20 * 8}
    assert world.status.summary.goodput == "0%"


def test_reported_activities_divide_the_time() -> None:
    world = build_running_world()
    world.advance(50, step=40, saved=40, starting=5, training=33.4, dataWait=6.6, checkpoint=5)
    assert world.seconds == {"queued": 10, "starting": 25, "training": 33, "dataWait": 7, "checkpoint": 5}
    assert world.status.summary.goodput == "41%"
    world.advance(20, step=60, saved=40, starting=5, training=53, dataWait=7, checkpoint=5)
    assert world.seconds == {"queued": 10, "starting": 25, "training": 53, "dataWait": 7, "checkpoint": 5}
    assert world.stage("alignment").progress.unsaved_seconds == 20


def test_unreachable_workers_count_as_training() -> None:
    """The operator assumes so, and the condition says why it doesn't know more."""
    world = build_running_world()
    world.progress_errors["alignment", 1] = "port 9400 of pod demo-alignment-1-0: no answer in time"
    world.advance(0)
    condition = world.status.condition(ConditionType.RUNNING)
    assert condition is not None
    assert condition.message == (
        "alignment is running, but its progress can't be read (port 9400 of pod demo-alignment-1-0: no answer in "
        "time); check NetworkPolicies between the operator and the workers"
    )
    world.now += 500
    world.end_worker(0, 1)
    world.end_worker(1, 1)
    world.reconcile_once()
    assert world.seconds["queued"] + world.seconds["starting"] == 30
    assert world.seconds.get("training", 0) + world.seconds.get("lost", 0) == 500


def test_unsaved_training_before_a_crash_is_lost() -> None:
    world = build_running_world()
    world.advance(60, step=40, saved=40, training=60)
    world.advance(15, step=55, saved=40, training=75)
    world.now += 5
    world.end_worker(0, 1)
    world.end_worker(1, 1)
    world.reconcile_once()
    assert world.seconds == {"queued": 10, "starting": 20, "training": 60, "lost": 20}
    assert world.status.goodput.gpu_seconds == {"starting": 160, "training": 480, "lost": 160}
    world.run_until_stable()
    assert world.stage("alignment").progress.unsaved_seconds == 0


def test_preemption_with_a_checkpoint_loses_nothing() -> None:
    world = build_running_world()
    world.advance(60, step=40, saved=20, training=60)
    for index in (0, 1):
        world.end_worker(index, ExitCode.PREEMPTED)
    world.reconcile_once()
    assert world.seconds == {"queued": 10, "starting": 20, "training": 60}


def test_in_place_restart_loses_unsaved_training() -> None:
    world = build_running_world()
    world.advance(60, step=40, saved=30, training=60)
    world.advance(10, step=50, saved=30, training=70)
    world.advance(10, step=31, saved=30, training=72, starting=8)
    assert world.seconds == {"queued": 10, "starting": 28, "training": 60, "lost": 12}


def test_in_place_restarts_are_counted_and_reported() -> None:
    world = build_running_world()
    world.advance(100, step=10, training=80)
    for restarts in (1, 1, 2):
        world.progress["alignment", 1] = replace(world.progress["alignment", 1], in_place_restarts=restarts)
        world.now += 10
        world.run_until_stable()
    assert world.stage("alignment").restarts == {"InPlace": 2}
    assert [e.reason for e in world.events].count("RestartedInPlace") == 2
    assert world.status.summary.restarts == 2
    world.end_worker(0, 139)
    world.end_worker(1, 76)
    world.run_until_stable()
    stage = world.stage("alignment")
    assert stage.progress is not None
    assert (stage.restarts, stage.progress.in_place_restarts) == ({"InPlace": 2, "Crash": 1}, 0)


def test_gpu_seconds_follow_the_job_not_an_edited_spec() -> None:
    world = build_running_world()
    before = sum(world.status.goodput.gpu_seconds.values())
    world.jobs = {name: msgspec.structs.replace(job, gpus=4) for name, job in world.jobs.items()}
    world.spec = ALIGNMENT | {"workers": {"nodes": 2, "gpusPerNode": 1}}
    world.advance(100, step=10, training=100)
    assert sum(world.status.goodput.gpu_seconds.values()) - before == 100 * 2 * 4


def test_backoff_and_suspension_have_their_own_buckets() -> None:
    world = build_running_world()
    world.advance(60, step=40, saved=40, training=60)
    world.end_worker(0, 1)
    world.end_worker(1, 1)
    world.run_until_stable()
    world.now += 30
    world.run_until_stable()
    assert world.seconds == {"queued": 10, "starting": 20, "training": 60, "restarting": 30}
    world.spec = ALIGNMENT | {"suspend": True}
    world.run_until_stable()
    world.pods.clear()
    world.run_until_stable()
    world.now += 3600
    world.spec = ALIGNMENT
    world.run_until_stable()
    assert world.seconds["suspended"] == 3600
    assert "suspended" not in world.status.goodput.gpu_seconds
    assert int(world.status.summary.goodput.removesuffix("%")) > 30, "suspended time doesn't lower goodput"


def test_restarted_operator_accounts_for_its_downtime() -> None:
    world = build_running_world()
    world.advance(60, step=40, saved=40, training=60)
    world.progress.clear()
    world.now += 100
    world.end_worker(0, 1)
    world.end_worker(1, 1)
    world.run_until_stable()
    assert world.seconds["training"] + world.seconds["lost"] == 160
    assert sum(world.seconds.values()) == int(world.now) - 1000


def test_fractions_of_seconds_are_carried_over_many_restarts() -> None:
    world = build_running_world()
    for attempt in range(1, 11):
        world.now += 4.7
        for index in (0, 1):
            world.end_worker(index, ExitCode.CONFIG)
        world.run_until_stable()
        assert world.stage("alignment").state == "Failed"
        world.now += 1000  # until a user fixes the spec
        world.restart_stage = "alignment"
        world.run_until_stable()
        assert world.stage("alignment").attempt == attempt + 1
    assert sum(world.seconds.values()) == pytest.approx(30 + 47, abs=1)


def test_time_between_completion_and_an_appended_stage_is_not_accounted() -> None:
    world = TrainingWorld()
    finish_run(world)
    spent = sum(world.seconds.values())
    world.now += 86400
    world.spec = {"stages": [*_stages(), {"name": "more", "sft": {"data": [{"path": "/d"}], "epochs": "1"}}]}
    finish_run(world)
    assert sum(world.seconds.values()) == spent


def _stages() -> list[Any]:
    from tests.support.builders.operator import SPEC

    return list(SPEC["stages"])


Move = tuple[str, float]
MOVES = st.lists(
    st.tuples(st.sampled_from(["work", "save", "crash", "suspend", "resume", "unseen"]), st.floats(0, 500)), max_size=25
)


@given(MOVES)
def test_goodput_counts_every_second_once(moves: list[Move]) -> None:
    world = build_running_world()
    for what, seconds in moves:
        _make_move(world, what, seconds)
    world.now += 1
    world.spec = ALIGNMENT | {"suspend": not world.spec.get("suspend", False)}
    world.run_until_stable()
    assert sum(world.seconds.values()) == int(world.now - 1000)
    assert all(value > 0 for value in world.seconds.values())


def _make_move(world: TrainingWorld, what: str, seconds: float) -> None:
    attempt = world.stage("alignment").attempt
    seen = world.progress.get(("alignment", attempt))
    step, trained = (seen.step, seen.seconds["training"]) if seen else (0, 0.0)
    match what:
        case "work":
            world.advance(seconds, attempt=attempt, step=step + 1, training=trained + 0.9 * seconds, dataWait=1.0)
        case "save":
            world.advance(seconds, attempt=attempt, step=step + 1, saved=step + 1, training=trained + 2 * seconds)
        case "crash" if any(p.terminated is None for p in world.pods.values()):
            world.now += seconds
            world.pods = {n: p for n, p in world.pods.items() if p.terminated is None}
            for pod in list(world.pods.values()):
                world.end_worker(pod.index, ExitCode.PREEMPTED)
            world.run_until_stable()
        case "suspend" | "resume":
            world.now += seconds
            world.spec = ALIGNMENT | {"suspend": what == "suspend"}
            world.run_until_stable()
            if what == "suspend":
                world.pods.clear()
            world.run_until_stable()
        case _:
            world.now += seconds
            world.run_until_stable()


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        pytest.param(10, {"a": 1, "b": 1}, {"a": 5, "b": 5}, id="even"),
        pytest.param(10, {"a": 2, "b": 1}, {"a": 7, "b": 3}, id="the largest remainder"),
        pytest.param(1, {"b": 1, "a": 1}, {"a": 1, "b": 0}, id="a tie by name"),
        pytest.param(7, {"a": 0, "b": 0}, {"a": 4, "b": 3}, id="no weight"),
        pytest.param(0, {"a": 3}, {"a": 0}, id="nothing"),
        pytest.param(90, {"a": 45, "b": 45}, {"a": 45, "b": 45}, id="itself"),
    ],
)
def test_apportion_uses_largest_remainders(total: int, weights: dict[str, int], shares: dict[str, int]) -> None:
    assert apportion(total, weights) == shares
