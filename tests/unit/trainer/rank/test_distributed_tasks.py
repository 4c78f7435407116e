"""The task pool on one rank: each task once, resume, stop requests, and what is recorded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank import distributed_tasks
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from tests.support.builders.training import build_stage


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return build_single_process_context(build_stage(tmp_path), scratch=tmp_path / "scratch")


def run_tasks(context: Context, count: int, done: set[int] | None = None) -> list[int]:
    """The numbers of the tasks that were run."""
    ran: list[int] = []
    TaskPool(context).run("counting", count, lambda task: task in (done or set()), ran.append)
    return ran


def test_only_tasks_without_output_are_run(context: Context) -> None:
    assert run_tasks(context, 4, done={0, 2}) == [1, 3]


def test_second_pool_runs_tasks_of_the_same_name(context: Context) -> None:
    """The store outlives a pool, so each pool has keys of its own."""
    assert [run_tasks(context, 2) for _ in range(2)] == [[0, 1], [0, 1]]


def test_stop_request_is_obeyed_before_the_next_task(context: Context, tmp_path: Path) -> None:
    def request_stop(task: int) -> None:
        ran.append(task)
        (tmp_path / "scratch" / "stop").touch()

    ran: list[int] = []
    with pytest.raises(Preempted):
        TaskPool(context).run("counting", 3, lambda _: False, request_stop)
    assert ran == [0]


def request_stop_and_report(pool: TaskPool, scratch: Path) -> None:
    (scratch / "stop").touch()
    pool.report_activity()
    pytest.fail("the task continues")


def test_stop_request_ends_a_task_that_reports_its_activity(context: Context, tmp_path: Path) -> None:
    pool = TaskPool(context)
    with pytest.raises(Preempted):
        pool.run("counting", 3, lambda _: False, lambda _: request_stop_and_report(pool, tmp_path / "scratch"))


def test_stop_request_ends_the_task_of_the_first_rank(context: Context, tmp_path: Path) -> None:
    pool = TaskPool(context)
    with pytest.raises(Preempted):
        pool.run_on_first_rank("listing", lambda: request_stop_and_report(pool, tmp_path / "scratch"))


def test_result_of_the_first_rank_is_kept_if_the_stop_request_comes_too_late(context: Context, tmp_path: Path) -> None:
    TaskPool(context).run_on_first_rank("reporting", (tmp_path / "scratch" / "stop").touch)


def test_activity_is_reported_at_intervals_only(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    monkeypatch.setattr(context.telemetry, "update", lambda: updates.append(1))
    pool = TaskPool(context)
    for _ in range(1000):
        pool.report_activity()
    assert 1 <= len(updates) < 50


@pytest.mark.parametrize("phase", ["starting", "running"])
def test_time_is_recorded_once(phase: str, context: Context) -> None:
    """Before the stage runs, its time is recorded as `starting` already."""
    if phase == "running":
        context.telemetry.update(phase="running")
    run_tasks(context, 2)
    activities = {"starting"} if phase == "starting" else {"starting", "counting", "waiting"}
    assert context.telemetry.progress.seconds.keys() == activities


def test_stop_of_one_rank_is_announced_to_the_others(context: Context, tmp_path: Path) -> None:
    """The rank that was asked to stop announces it in the store, which the pool of another rank reads."""
    pool, pool_of_another_rank = TaskPool(context), TaskPool(context)
    pool_of_another_rank._prefix = pool._prefix
    (tmp_path / "scratch" / "stop").touch()
    with pytest.raises(Preempted):
        pool.run("counting", 3, lambda _: False, lambda _: pytest.fail("no task may start"))
    (tmp_path / "scratch" / "stop").unlink()
    assert not context.preemption.is_requested_locally, "as on a rank that was not asked"
    pool_of_another_rank.run("measuring", 3, lambda _: False, lambda _: pytest.fail("no task may start"))


def test_heartbeats_continue_while_the_first_rank_works(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_tasks, "HEARTBEAT_SECONDS", 0.001)
    sent = threading.Semaphore(0)
    update = context.telemetry.update

    def note_and_update(**changes: object) -> None:
        update(**changes)
        sent.release()

    def wait_for_heartbeats() -> None:
        while sent.acquire(blocking=False):
            pass
        assert all(sent.acquire(timeout=60) for _ in range(3))

    monkeypatch.setattr(context.telemetry, "update", note_and_update)
    TaskPool(context).run_on_first_rank("measuring", wait_for_heartbeats)
