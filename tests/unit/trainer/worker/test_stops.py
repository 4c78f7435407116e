"""SIGTERM and SIGKILL of a worker: ranks save and stop together, and none of them outlives its worker."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest

from sailvl_trainer.contract import Env
from tests.support.worker_processes import WorkerProcesses, wait_until_gone

pytestmark = pytest.mark.slow
Build = Callable[..., WorkerProcesses]
STOPPED_WHILE_STARTING = "stopped while starting; no work is lost"


def test_all_workers_stop_with_the_same_checkpoint(build_workers: Build) -> None:
    workers = build_workers("step_until_stopped", nodes=2)
    workers.start_all()
    workers.wait_for_step(3)
    for _ in range(2):  # a second signal has no effect
        workers.processes[1].terminate()
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [75, 75], workers.read_log()
    assert ended[0].checkpoint is not None
    assert ended[0].checkpoint == ended[1].checkpoint


def test_ranks_that_ignore_the_stop_are_killed_after_the_grace_period(build_workers: Build) -> None:
    workers = build_workers("ignore_stop_file", environment={Env.GRACE_SECONDS: 1})
    workers.start()
    workers.wait_for_step(1)
    pids = workers.find_ranks()
    workers.processes[0].terminate()
    ended = workers.wait_for_end()
    assert (ended.exit_code, "no checkpoint was saved within 1 s" in ended.message) == (143, True)
    assert pids
    wait_until_gone(pids)


def test_stop_while_ranks_start_ends_the_worker_at_once(build_workers: Build) -> None:
    workers = build_workers("never_finish_starting", environment={Env.GRACE_SECONDS: 600})
    workers.start()
    workers.wait_for(workers.find_ranks)
    workers.processes[0].terminate()
    assert workers.wait_for_end().message == STOPPED_WHILE_STARTING


def test_stop_before_the_other_workers_start_ends_the_worker_at_once(build_workers: Build) -> None:
    workers = build_workers("succeed", nodes=2)
    workers.start(0)
    workers.wait_for(lambda: accepts_connections(workers.metrics_port))
    assert json.loads(workers.get("/progress"))["phase"] == "starting"
    assert workers.get("/healthz") == "ok\n"
    workers.processes[0].terminate()
    ended = workers.wait_for_end()
    assert (ended.exit_code, ended.message) == (75, STOPPED_WHILE_STARTING)


def test_ranks_die_with_their_killed_worker(build_workers: Build) -> None:
    workers = build_workers("ignore_stop_file")
    workers.start()
    workers.wait_for_step(1)
    pids = workers.find_ranks()
    assert pids
    workers.processes[0].kill()
    wait_until_gone(pids)


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
