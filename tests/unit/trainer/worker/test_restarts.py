"""Workers that find each other, restart their ranks in place, and reuse a result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Env, Result
from sailvl_trainer.storage.layout import StageFiles
from tests.support.builders.worker import build_stage
from tests.support.worker_processes import WorkerProcesses

pytestmark = pytest.mark.slow
Build = Callable[..., WorkerProcesses]


def test_next_attempt_reuses_the_result(build_workers: Build) -> None:
    first = build_workers("succeed", environment={Env.PROCESSES_PER_NODE: 2})
    first.start()
    ended = first.wait_for_end()
    assert ended.exit_code == 0, first.read_log()
    assert ended.result is not None
    assert (ended.result.steps, ended.result.metrics) == (2, {"loss": 0.5}), "JSON has no NaN"
    second = build_workers("reject_settings")
    second.start()
    assert second.wait_for_end().result == replace(ended.result, reused=True)


def test_worker_that_sees_the_storage_late_finds_the_result_while_it_waits(
    build_workers: Build, tmp_path: Path
) -> None:
    workers = build_workers("succeed", nodes=2)
    workers.start(1)
    workers.wait_for(lambda: workers.read_progress(1) is not None)
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    StageFiles(build_stage(tmp_path)).write_result(result)
    assert workers.wait_for_end(1).exit_code == 0


def test_worker_of_index_0_may_start_last(build_workers: Build) -> None:
    workers = build_workers("succeed", nodes=2)
    workers.start(1)
    workers.wait_for(lambda: workers.read_progress(1) is not None)
    time.sleep(4)  # longer than the imports of a rank take
    workers.start(0)
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [0, 0], workers.read_log()
    assert ended[0].result is not None
    assert ended[0].result.steps == 2
    assert ended[1].result is None


def test_restart_in_place_recovers_from_a_crash_and_keeps_counters(build_workers: Build) -> None:
    workers = build_workers("crash_once", environment={Env.IN_PLACE_RESTARTS: 1})
    workers.start()
    metrics = []
    until = time.monotonic() + workers.timeout_seconds
    while workers.processes[0].poll() is None and time.monotonic() < until:
        try:
            metrics.append(workers.get("/metrics"))
        except OSError:
            continue
        time.sleep(0.05)
    assert workers.wait_for_end().exit_code == 0, workers.read_log()
    assert "first start of rank 0" in workers.read_log()
    counted = 'sailvl_samples_total{outcome="trained",run="demo",stage="curate"} 6.0'
    assert any(counted in text for text in metrics), metrics[-1]


def test_restart_in_place_on_one_worker_is_counted_by_all(build_workers: Build) -> None:
    workers = build_workers("crash_once", nodes=2, environment={Env.IN_PLACE_RESTARTS: 1})
    workers.start_all()
    assert [ended.exit_code for ended in workers.wait_for_all()] == [0, 0], workers.read_logs()
    progress = [workers.read_progress(index) for index in range(2)]
    assert [found and found.in_place_restarts for found in progress] == [1, 1]


def test_worker_exits_if_its_peer_ended_with_a_non_retryable_code(build_workers: Build) -> None:
    """It tries to restart its ranks in place and finds that the peer doesn't rejoin."""
    workers = build_workers("reject_settings", nodes=2, environment={Env.IN_PLACE_RESTARTS: 3})
    workers.start_all()
    assert sorted(ended.exit_code for ended in workers.wait_for_all()) == [64, 76], workers.read_logs()
