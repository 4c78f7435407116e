"""The ledger of a run's time: every second is entered once, into the bucket of what was going on."""

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
from tests.support.core_world import World, finish

ALIGNMENT: dict[str, Any] = {
    "workers": {"nodes": 2, "gpusPerNode": 4},
    "stages": [{"name": "alignment", "pretrain": {"train": ["connector"], "data": [{"path": "/d"}], "tokens": "32K"}}],
}


class Clock(World):
    """A world of one training stage; only the test moves its time."""

    def wait(self, seconds: float, *, attempt: int = 1, step: int = 0, saved: int = 0, **spent: float) -> None:
        """Time passes, and the workers tell of it where `spent` says what they did: seconds of the whole attempt."""
        self.now += seconds
        if spent:
            self.progress["alignment", attempt] = Progress(
                attempt=attempt,
                phase="training",
                step=step,
                seconds=dict(spent),
                checkpoint=Checkpoint(step=saved, path=f"c/{saved}") if saved else None,
            )
        self.settle()

    @property
    def seconds(self) -> dict[str, int]:
        return self.status.goodput.seconds


def begin() -> Clock:
    """Its pods are there and have no node yet."""
    clock = Clock(spec=ALIGNMENT, is_patient=False)
    clock.step()
    clock.hold(node="", placed=0.0, is_ready=False)
    return clock


def run() -> Clock:
    """10 s in the queue, 20 s starting; all workers run."""
    clock = begin()
    clock.now += 5
    clock.hold(unschedulable="0/2 nodes are available")
    clock.now += 5
    clock.hold(node="node-0", placed=clock.now, unschedulable="")
    clock.now += 20
    clock.hold(is_ready=True)
    return clock


def test_waiting_for_a_node_and_starting_are_told_apart() -> None:
    clock = run()
    assert clock.seconds == {"queued": 10, "starting": 20}
    assert clock.status.goodput.gpu_seconds == {"starting": 20 * 8}
    assert clock.status.summary.goodput == "0%"


def test_workers_say_what_they_did() -> None:
    clock = run()
    clock.wait(50, step=40, saved=40, starting=5, training=33.4, dataWait=6.6, checkpoint=5)
    assert clock.seconds == {"queued": 10, "starting": 25, "training": 33, "dataWait": 7, "checkpoint": 5}
    assert clock.status.summary.goodput == "41%"
    clock.wait(20, step=60, saved=40, starting=5, training=53, dataWait=7, checkpoint=5)
    assert clock.seconds == {"queued": 10, "starting": 25, "training": 53, "dataWait": 7, "checkpoint": 5}
    assert clock.stage("alignment").progress.unsaved_seconds == 20


def test_workers_that_nobody_can_ask_are_at_work() -> None:
    """As far as the operator knows; the condition says why it doesn't know more."""
    clock = run()
    clock.progress_errors["alignment", 1] = "port 9400 of pod demo-alignment-1-0: no answer in time"
    clock.wait(0)
    condition = clock.status.condition(ConditionType.RUNNING)
    assert condition is not None
    assert condition.message == (
        "alignment is running, but its progress can't be read (port 9400 of pod demo-alignment-1-0: no answer in "
        "time); check NetworkPolicies between the operator and the workers"
    )
    clock.now += 500
    clock.end(0, 1)
    clock.end(1, 1)
    clock.step()
    assert clock.seconds["queued"] + clock.seconds["starting"] == 30
    assert clock.seconds.get("training", 0) + clock.seconds.get("lost", 0) == 500


def test_what_a_crash_cost_is_lost() -> None:
    clock = run()
    clock.wait(60, step=40, saved=40, training=60)
    clock.wait(15, step=55, saved=40, training=75)
    clock.now += 5
    clock.end(0, 1)
    clock.end(1, 1)
    clock.step()
    assert clock.seconds == {"queued": 10, "starting": 20, "training": 60, "lost": 20}
    assert clock.status.goodput.gpu_seconds == {"starting": 160, "training": 480, "lost": 160}
    clock.settle()
    assert clock.stage("alignment").progress.unsaved_seconds == 0


def test_a_preempted_attempt_that_saved_lost_nothing() -> None:
    clock = run()
    clock.wait(60, step=40, saved=20, training=60)
    for index in (0, 1):
        clock.end(index, ExitCode.PREEMPTED)
    clock.step()
    assert clock.seconds == {"queued": 10, "starting": 20, "training": 60}


def test_ranks_that_start_again_in_place_lose_what_was_not_saved() -> None:
    clock = run()
    clock.wait(60, step=40, saved=30, training=60)
    clock.wait(10, step=50, saved=30, training=70)
    clock.wait(10, step=31, saved=30, training=72, starting=8)
    assert clock.seconds == {"queued": 10, "starting": 28, "training": 60, "lost": 12}


def test_ranks_that_start_again_in_place_are_counted_and_told_of() -> None:
    clock = run()
    clock.wait(100, step=10, training=80)
    for restarts in (1, 1, 2):
        clock.progress["alignment", 1] = replace(clock.progress["alignment", 1], in_place_restarts=restarts)
        clock.now += 10
        clock.settle()
    assert clock.stage("alignment").restarts == {"InPlace": 2}
    assert [e.reason for e in clock.events].count("RestartedInPlace") == 2
    assert clock.status.summary.restarts == 2
    clock.end(0, 139)
    clock.end(1, 76)
    clock.settle()
    stage = clock.stage("alignment")
    assert stage.progress is not None
    assert (stage.restarts, stage.progress.in_place_restarts) == ({"InPlace": 2, "Crash": 1}, 0)


def test_gpus_are_those_that_the_workers_hold_not_those_of_a_changed_spec() -> None:
    clock = run()
    before = sum(clock.status.goodput.gpu_seconds.values())
    clock.jobs = {name: msgspec.structs.replace(job, gpus=4) for name, job in clock.jobs.items()}
    clock.spec = ALIGNMENT | {"workers": {"nodes": 2, "gpusPerNode": 1}}
    clock.wait(100, step=10, training=100)
    assert sum(clock.status.goodput.gpu_seconds.values()) - before == 100 * 2 * 4


def test_backoff_and_suspension_have_their_buckets() -> None:
    clock = run()
    clock.wait(60, step=40, saved=40, training=60)
    clock.end(0, 1)
    clock.end(1, 1)
    clock.settle()
    clock.now += 30
    clock.settle()
    assert clock.seconds == {"queued": 10, "starting": 20, "training": 60, "restarting": 30}
    clock.spec = ALIGNMENT | {"suspend": True}
    clock.settle()
    clock.pods.clear()
    clock.settle()
    clock.now += 3600
    clock.spec = ALIGNMENT
    clock.settle()
    assert clock.seconds["suspended"] == 3600
    assert "suspended" not in clock.status.goodput.gpu_seconds
    assert int(clock.status.summary.goodput.removesuffix("%")) > 30, "a suspension isn't held against it"


def test_a_restarted_operator_books_the_time_without_it() -> None:
    clock = run()
    clock.wait(60, step=40, saved=40, training=60)
    clock.progress.clear()
    clock.now += 100
    clock.end(0, 1)
    clock.end(1, 1)
    clock.settle()
    assert clock.seconds["training"] + clock.seconds["lost"] == 160
    assert sum(clock.seconds.values()) == int(clock.now) - 1000


def test_parts_of_seconds_at_many_ends_add_up() -> None:
    clock = run()
    for attempt in range(1, 11):
        clock.now += 4.7
        for index in (0, 1):
            clock.end(index, ExitCode.CONFIG)
        clock.settle()
        assert clock.stage("alignment").state == "Failed"
        clock.now += 1000  # until a person has mended it
        clock.restart_stage = "alignment"
        clock.settle()
        assert clock.stage("alignment").attempt == attempt + 1
    assert sum(clock.seconds.values()) == pytest.approx(30 + 47, abs=1)


def test_the_pause_before_an_appended_stage_is_nobodys() -> None:
    clock = Clock()
    finish(clock)
    spent = sum(clock.seconds.values())
    clock.now += 86400
    clock.spec = {"stages": [*_stages(), {"name": "more", "sft": {"data": [{"path": "/d"}], "epochs": "1"}}]}
    finish(clock)
    assert sum(clock.seconds.values()) == spent


def _stages() -> list[Any]:
    from tests.support.builders.operator import SPEC

    return list(SPEC["stages"])


Move = tuple[str, float]
MOVES = st.lists(
    st.tuples(st.sampled_from(["work", "save", "crash", "suspend", "resume", "unseen"]), st.floats(0, 500)), max_size=25
)


@given(MOVES)
def test_every_second_is_entered_once(moves: list[Move]) -> None:
    clock = run()
    for what, seconds in moves:
        _make_move(clock, what, seconds)
    clock.now += 1
    clock.spec = ALIGNMENT | {"suspend": not clock.spec.get("suspend", False)}
    clock.settle()
    assert sum(clock.seconds.values()) == int(clock.now - 1000)
    assert all(value > 0 for value in clock.seconds.values())


def _make_move(clock: Clock, what: str, seconds: float) -> None:
    attempt = clock.stage("alignment").attempt
    seen = clock.progress.get(("alignment", attempt))
    step, trained = (seen.step, seen.seconds["training"]) if seen else (0, 0.0)
    match what:
        case "work":
            clock.wait(seconds, attempt=attempt, step=step + 1, training=trained + 0.9 * seconds, dataWait=1.0)
        case "save":
            clock.wait(seconds, attempt=attempt, step=step + 1, saved=step + 1, training=trained + 2 * seconds)
        case "crash" if any(p.terminated is None for p in clock.pods.values()):
            clock.now += seconds
            clock.pods = {n: p for n, p in clock.pods.items() if p.terminated is None}
            for pod in list(clock.pods.values()):
                clock.end(pod.index, ExitCode.PREEMPTED)
            clock.settle()
        case "suspend" | "resume":
            clock.now += seconds
            clock.spec = ALIGNMENT | {"suspend": what == "suspend"}
            clock.settle()
            if what == "suspend":
                clock.pods.clear()
            clock.settle()
        case _:
            clock.now += seconds
            clock.settle()


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
def test_apportion(total: int, weights: dict[str, int], shares: dict[str, int]) -> None:
    assert apportion(total, weights) == shares
