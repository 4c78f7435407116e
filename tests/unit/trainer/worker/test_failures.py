"""Ranks that crash, hang or run out of memory: the worker exits with their root cause."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sailvl_trainer.contract import Env
from tests.support.worker_processes import WorkerProcesses, wait_until_gone

pytestmark = pytest.mark.slow
Build = Callable[..., WorkerProcesses]
CGROUP_2, LIMIT_BYTES = Path("/sys/fs/cgroup"), 3 << 29


def test_non_retryable_code_ends_the_worker_without_restart(build_workers: Build) -> None:
    workers = build_workers("reject_settings", environment={Env.PROCESSES_PER_NODE: 2, Env.IN_PLACE_RESTARTS: 3})
    workers.start()
    ended = workers.wait_for_end()
    assert (ended.exit_code, ended.rank, ended.message) == (64, 1, "learningRate is 7; set less")
    assert "raise ConfigError" in ended.traceback
    assert workers.read_log().count("ConfigError: learningRate") == 1


def test_killed_rank_is_named_and_its_peer_reports_a_lost_connection(build_workers: Build) -> None:
    workers = build_workers("kill_last_rank", nodes=2)
    workers.start_all()
    peer, killed = sorted(workers.wait_for_all(), key=lambda termination: termination.exit_code)
    assert (killed.exit_code, killed.rank) == (137, 1)
    assert killed.message == "rank 1 was killed by SIGKILL"
    assert (peer.exit_code, peer.rank) == (76, 0)
    assert "lost the connection to another rank" in peer.message


def test_segfault_leaves_its_stack(build_workers: Build) -> None:
    workers = build_workers("segfault", environment={Env.PROCESSES_PER_NODE: 2})
    workers.start()
    ended = workers.wait_for_end()
    assert ended.exit_code == 128 + signal.SIGSEGV
    assert "SIGSEGV; its stack is in the log" in ended.message
    assert "in segfault" in ended.traceback
    assert "in segfault" in workers.read_log()


def test_import_error_of_a_rank_is_reported(build_workers: Build) -> None:
    workers = build_workers("succeed", rank_module="no_such_module")
    workers.start()
    ended = workers.wait_for_end()
    assert (ended.exit_code, ended.rank) == (1, 0)
    assert ended.message == "ImportError: No module named no_such_module"
    assert "runpy" in ended.traceback


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """Return a control group whose memory suffices for a worker and little more."""
    for folder, limit in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (CGROUP_2, "memory.max")):
        group = folder / f"sailvl-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(LIMIT_BYTES))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group with a memory limit can be created here")


def test_oom_kill_is_reported_with_peak_and_limit(build_workers: Build, small_cgroup: Path) -> None:
    workers = build_workers("exhaust_memory", cgroup=small_cgroup)
    workers.start()
    ended = workers.wait_for_end()
    assert (ended.exit_code, ended.rank) == (67, 0), workers.read_log()
    assert re.search(r"OOM-killed: peak 1\.\d GiB of 1\.5 GiB; raise the workers' memory", ended.message)


def test_hang_ends_the_worker_with_the_stacks_of_all_ranks(build_workers: Build) -> None:
    workers = build_workers("hang_last_rank", environment={Env.PROCESSES_PER_NODE: 2, Env.STALL_TIMEOUT_SECONDS: 2})
    workers.start()
    ended = workers.wait_for_end()
    message = "no progress for 2 s (running, after step 7); stacks are in the log of every worker"
    assert (ended.exit_code, ended.message) == (68, message)
    log = workers.read_log()
    assert log.index("local rank 0") < log.index("in sum_over_ranks") < log.index("local rank 1")
    assert log.index("local rank 1") < log.index("in sleep_forever")
    assert "in sleep_forever" in ended.traceback


def test_hang_on_one_worker_shows_the_stacks_of_all_workers(build_workers: Build) -> None:
    workers = build_workers("hang_last_rank", nodes=2, environment={Env.STALL_TIMEOUT_SECONDS: 2})
    workers.start_all()
    assert [ended.exit_code for ended in workers.wait_for_all()] == [68, 68], workers.read_logs()
    logs = sorted((workers.read_log(0), workers.read_log(1)), key=lambda log: "in sleep_forever" in log)
    assert "in sum_over_ranks" in logs[0], "the rank that waits in the collective"
    assert "in sleep_forever" in logs[1]


def test_hang_is_reported_by_a_worker_whose_peer_exits_first(build_workers: Build) -> None:
    workers = build_workers("hang_last_rank", nodes=2)
    workers.start(
        0, **{Env.STALL_TIMEOUT_SECONDS: 2}
    )  # it hosts the store of both workers, and exits before the other one reports
    workers.start(1, **{Env.STALL_TIMEOUT_SECONDS: 4})
    assert [ended.exit_code for ended in workers.wait_for_all()] == [68, 68], workers.read_logs()
    assert "lost the connection to worker 0" in workers.read_log(1)
    assert "in sleep_forever" in workers.wait_for_end(1).traceback


def test_stopped_rank_is_reported_with_its_process_state(build_workers: Build) -> None:
    workers = build_workers("step_until_stopped", nodes=2, environment={Env.STALL_TIMEOUT_SECONDS: 2})
    workers.start_all()
    workers.wait_for_step(2)
    (rank,) = workers.find_ranks(1)
    os.kill(rank, signal.SIGSTOP)
    stopped, began = workers.wait_for_end(1), time.monotonic()
    assert (stopped.exit_code, "state T (stopped)" in stopped.traceback) == (68, True), workers.read_log(1)
    assert workers.wait_for_end(0).exit_code == 68, workers.read_log(0)
    assert time.monotonic() - began < 10, "both exit at about the same time"
    assert "in should_stop" in workers.read_log(0), "its peer waits in a collective"
    wait_until_gone([rank])


def test_workers_that_never_meet_exit_and_say_what_to_check(build_workers: Build) -> None:
    slack = 19  # seconds: longer than the imports take on a busy machine
    environment: dict[str, object] = {Env.STALL_TIMEOUT_SECONDS: 2, "MIN_START_SLACK_SECONDS": slack}
    workers = build_workers("succeed", nodes=2, start_timeout=1, environment=environment)
    workers.start(1)
    ended = workers.wait_for_end(1)
    assert (ended.exit_code, ended.ranks_started) == (68, False)
    assert ended.message.startswith("no rank was started within 20 s: ")
    assert "in _wait_for_store" in ended.traceback
