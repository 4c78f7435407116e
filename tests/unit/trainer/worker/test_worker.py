"""Whole workers as processes, with ranks that do what a test says: every way in which an attempt can end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Env, Progress, Result, Termination
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.layout import StageFiles
from tests.support.builders.worker import build_stage, free_port

pytestmark = pytest.mark.slow
LIMIT = 60
"""Seconds that a worker may take."""
WORKER = """
import os, sys
if sys.argv[2]:
    open(sys.argv[2] + "/cgroup.procs", "w").write(str(os.getpid()))
from sailvl_trainer.worker import main as entry
entry.MEETING_SECONDS = int(os.environ.get("MEETING_SECONDS", entry.MEETING_SECONDS))
entry.main(sys.argv[1])
"""
CGROUP_2, LIMIT_BYTES = Path("/sys/fs/cgroup"), 3 << 29


@dataclass(kw_only=True)
class Attempt:
    """Workers that share this machine; their ranks are those of `tests/support/ranks/worker.py`."""

    root: Path
    scenario: str
    resources: ExitStack
    nodes: int = 1
    environment: dict[str, object] = field(default_factory=dict)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    start_timeout: int = 0
    """Seconds for which workers wait for each other, at most."""
    rank: str = "tests.support.ranks.worker"
    """The module that ranks run."""
    group: Path | None = None
    """A control group for the workers."""
    rendezvous: int = field(default_factory=free_port)
    metrics: int = field(default_factory=free_port)

    def start(self, index: int = 0, **environment: object) -> None:
        stage = self.root / "stage.json"
        stage.write_bytes(encode(build_stage(self.root, start_timeout_seconds=self.start_timeout)))
        log = self.resources.enter_context((self.root / f"log-{index}").open("wb"))
        variables = {
            Env.STAGE_FILE: stage,
            Env.NODES: self.nodes,
            Env.NODE_RANK: index,
            Env.RENDEZVOUS_PORT: self.rendezvous,
            Env.METRICS_PORT: self.metrics,
            Env.METRICS_PORT_OFFSET: index,
            Env.TERMINATION_LOG: self.root / f"termination-{index}",
            Env.SCRATCH: self.root / f"scratch-{index}",
            "OMP_NUM_THREADS": 1,
            "SCENARIO": self.scenario,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, self.rank, str(self.group or "")],
            env=os.environ | {k: str(v) for k, v in (variables | self.environment | environment).items()},
            stdout=log,
            stderr=log,
        )
        self.processes[index] = process
        self.resources.callback(stop, process)

    def progress(self, index: int = 0) -> Progress | None:
        path = self.root / f"scratch-{index}" / "progress.json"
        return decode(Progress, path.read_bytes()) if path.exists() else None

    def wait_for(self, is_there: Callable[[], object]) -> None:
        until = time.monotonic() + LIMIT
        while not is_there():
            assert time.monotonic() < until, self.log()
            assert all(p.poll() is None for p in self.processes.values()), self.log()
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: (found := self.progress()) is not None and found.step >= step)

    def end(self, index: int = 0) -> Termination:
        """What a worker says when it has ended; its exit code says the same."""
        code = self.processes[index].wait(LIMIT)
        said = decode(Termination, (self.root / f"termination-{index}").read_bytes())
        assert said.exit_code == code, self.log(index)
        return said

    def log(self, index: int = 0) -> str:
        return (self.root / f"log-{index}").read_text()

    def get(self, path: str, index: int = 0) -> str:
        with urllib.request.urlopen(f"http://localhost:{self.metrics + index}{path}", timeout=5) as response:
            return str(response.read().decode())


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    with ExitStack() as resources:
        yield lambda scenario, **fields: Attempt(root=tmp_path, scenario=scenario, resources=resources, **fields)


Start = Callable[..., Attempt]


def test_two_ranks_succeed_and_the_next_attempt_ends_at_once(attempt: Start) -> None:
    first = attempt("succeed", environment={Env.PROCESSES_PER_NODE: 2})
    first.start()
    said = first.end()
    assert said.exit_code == 0, first.log()
    assert said.result is not None
    assert (said.result.steps, said.result.metrics) == (2, {"loss": 0.5}), "NaN has no JSON"
    again = attempt("refuse")
    again.start()
    assert again.end().result == replace(said.result, reused=True)


def test_a_final_code_ends_the_worker_without_a_restart_in_place(attempt: Start) -> None:
    it = attempt("refuse", environment={Env.PROCESSES_PER_NODE: 2, Env.IN_PLACE_RESTARTS: 3})
    it.start()
    said = it.end()
    assert (said.exit_code, said.rank, said.message) == (64, 1, "learningRate is 7; set less")
    assert "raise ConfigError" in said.traceback
    assert it.log().count("ConfigError: learningRate") == 1


def test_a_neighbour_s_restart_in_place_is_counted_by_all(attempt: Start) -> None:
    it = attempt("crash_once", nodes=2, environment={Env.IN_PLACE_RESTARTS: 1})
    it.start(0)
    it.start(1)
    assert [it.end(index).exit_code for index in range(2)] == [0, 0], it.log(0) + it.log(1)
    told = [it.progress(index) for index in range(2)]
    assert [said and said.in_place_restarts for said in told] == [1, 1]


def test_a_crash_is_made_good_in_place_and_the_counts_go_on(attempt: Start) -> None:
    it = attempt("crash_once", environment={Env.IN_PLACE_RESTARTS: 1})
    it.start()
    metrics = []
    until = time.monotonic() + LIMIT
    while it.processes[0].poll() is None and time.monotonic() < until:
        try:
            metrics.append(it.get("/metrics"))
        except OSError:
            continue
        time.sleep(0.05)
    assert it.end().exit_code == 0, it.log()
    assert "first life of rank 0" in it.log()
    counted = 'sailvl_samples_total{namespace="team",outcome="trained",run="demo",stage="curate"} 6.0'
    assert any(counted in text for text in metrics), metrics[-1]


def test_a_killed_rank_is_named_and_its_neighbour_says_that_it_is_not_to_blame(attempt: Start) -> None:
    it = attempt("killed", nodes=2)
    it.start(0)
    it.start(1)
    neighbour, killed = sorted((it.end(index) for index in range(2)), key=lambda said: said.exit_code)
    assert (killed.exit_code, killed.rank) == (137, 1)
    assert killed.message == "rank 1 was ended by SIGKILL"
    assert (neighbour.exit_code, neighbour.rank) == (76, 0)
    assert "lost the connection to another rank" in neighbour.message


def test_a_hang_ends_the_worker_and_shows_every_ranks_stack(attempt: Start) -> None:
    it = attempt("hang", environment={Env.PROCESSES_PER_NODE: 2, Env.STALL_TIMEOUT_SECONDS: 2})
    it.start()
    said = it.end()
    words = "no progress for 2 s (running, after step 7); stacks are in the log of every worker"
    assert (said.exit_code, said.message) == (68, words)
    log = it.log()
    assert log.index("local rank 0") < log.index("in sum_over_ranks") < log.index("local rank 1")
    assert log.index("local rank 1") < log.index("in get_lost_in_thought")
    assert "in get_lost_in_thought" in said.traceback


def test_a_hang_on_one_worker_shows_the_stacks_of_all(attempt: Start) -> None:
    it = attempt("hang", nodes=2, environment={Env.STALL_TIMEOUT_SECONDS: 2})
    it.start(0)
    it.start(1)
    assert [it.end(index).exit_code for index in range(2)] == [68, 68], it.log(0) + it.log(1)
    logs = sorted((it.log(0), it.log(1)), key=lambda log: "in get_lost_in_thought" in log)
    assert "in sum_over_ranks" in logs[0], "the one that waits in the collective"
    assert "in get_lost_in_thought" in logs[1]


def test_a_hang_is_told_by_a_worker_whose_peer_has_ended_first(attempt: Start) -> None:
    it = attempt("hang", nodes=2)
    it.start(0, **{Env.STALL_TIMEOUT_SECONDS: 2})
    it.start(
        1, **{Env.STALL_TIMEOUT_SECONDS: 4}
    )  # the first, which has the store of both, goes before it has said a word
    assert [it.end(index).exit_code for index in range(2)] == [68, 68], it.log(0) + it.log(1)
    assert "RendezvousConnectionError" in it.log(1)
    assert "in get_lost_in_thought" in it.end(1).traceback


def test_workers_that_never_meet_end_and_say_where_to_look(attempt: Start) -> None:
    it = attempt("succeed", nodes=2, start_timeout=1, environment={Env.STALL_TIMEOUT_SECONDS: 2, "MEETING_SECONDS": 2})
    it.start(1)
    said = it.end(1)
    assert (said.exit_code, said.ranks_started) == (68, False)
    assert said.message.startswith("no rank was started within 3 s: ")
    assert "in _wait_for_store" in said.traceback


def test_a_stopped_rank_cannot_answer_and_the_kernel_answers_for_it(attempt: Start) -> None:
    it = attempt("step_until_stopped", nodes=2, environment={Env.STALL_TIMEOUT_SECONDS: 2})
    it.start(0)
    it.start(1)
    it.wait_for_step(2)
    (rank,) = children(it.processes[1].pid)
    os.kill(rank, signal.SIGSTOP)
    stopped, begun = it.end(1), time.monotonic()
    assert (stopped.exit_code, "state T (stopped)" in stopped.traceback) == (68, True), it.log(1)
    assert it.end(0).exit_code == 68, it.log(0)
    assert time.monotonic() - begun < 10, "both end at about the same time"
    assert "in should_stop" in it.log(0), "its neighbour waits in a collective"
    wait_until_gone([rank])


def test_ranks_stop_together_with_a_checkpoint(attempt: Start) -> None:
    it = attempt("step_until_stopped", nodes=2)
    it.start(0)
    it.start(1)
    it.wait_for_step(3)
    for _ in range(2):  # a second signal changes nothing
        it.processes[1].send_signal(signal.SIGTERM)
    said = [it.end(index) for index in range(2)]
    assert [t.exit_code for t in said] == [75, 75], it.log()
    assert said[0].checkpoint is not None
    assert said[0].checkpoint == said[1].checkpoint


def test_ranks_that_do_not_stop_are_ended_after_the_grace(attempt: Start) -> None:
    it = attempt("ignore_the_stop", environment={Env.GRACE_SECONDS: 1})
    it.start()
    it.wait_for_step(1)
    pids = children(it.processes[0].pid)
    it.processes[0].terminate()
    said = it.end()
    assert (said.exit_code, "no checkpoint within 1 s" in said.message) == (143, True)
    assert pids
    wait_until_gone(pids)


def test_a_stop_while_ranks_load_ends_at_once(attempt: Start) -> None:
    it = attempt("start_slowly", environment={Env.GRACE_SECONDS: 600})
    it.start()
    it.wait_for(lambda: children(it.processes[0].pid))
    it.processes[0].terminate()
    assert it.end().message == "stopped while it started; nothing is lost"


def test_a_crash_below_python_leaves_its_stack(attempt: Start) -> None:
    it = attempt("crash_below_python", environment={Env.PROCESSES_PER_NODE: 2})
    it.start()
    said = it.end()
    assert said.exit_code == 128 + signal.SIGSEGV
    assert "SIGSEGV; its stack is in the log" in said.message
    assert "in crash_below_python" in said.traceback
    assert "in crash_below_python" in it.log()


def test_a_rank_that_cannot_be_imported_says_why(attempt: Start) -> None:
    it = attempt("succeed", rank="no_such_module")
    it.start()
    said = it.end()
    assert (said.exit_code, said.rank) == (1, 0)
    assert said.message == "ImportError: No module named no_such_module"
    assert "runpy" in said.traceback


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with room for a worker and little more."""
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
    pytest.skip("no control group for memory can be made here")


def test_a_rank_that_the_kernel_kills_for_want_of_memory(attempt: Start, small_group: Path) -> None:
    it = attempt("eat", group=small_group)
    it.start()
    said = it.end()
    assert (said.exit_code, said.rank) == (67, 0), it.log()
    assert re.search(r"for want of memory: peak 1\.\d GiB of 1\.5 GiB; raise the workers' memory", said.message)


def test_ranks_do_not_outlive_their_worker(attempt: Start) -> None:
    it = attempt("ignore_the_stop")
    it.start()
    it.wait_for_step(1)
    pids = children(it.processes[0].pid)
    assert pids
    it.processes[0].kill()
    wait_until_gone(pids)


def test_a_stop_before_the_others_are_there(attempt: Start) -> None:
    it = attempt("succeed", nodes=2)
    it.start(0)
    it.wait_for(lambda: answers(it.metrics))
    assert json.loads(it.get("/progress"))["phase"] == "starting"
    assert it.get("/healthz") == "ok\n"
    it.processes[0].terminate()
    said = it.end()
    assert (said.exit_code, said.message) == (75, "stopped while it started; nothing is lost")


def test_the_worker_of_index_0_may_come_last(attempt: Start) -> None:
    it = attempt("succeed", nodes=2)
    it.start(1)
    it.wait_for(lambda: it.progress(1) is not None)
    time.sleep(4)  # as long as the imports take, and then some
    it.start(0)
    said = [it.end(index) for index in (0, 1)]
    assert [t.exit_code for t in said] == [0, 0], it.log()
    assert said[0].result is not None
    assert said[0].result.steps == 2
    assert said[1].result is None


def test_a_worker_whose_neighbour_failed_for_good_says_so_and_ends(attempt: Start) -> None:
    """It tries to start again in place, and finds that the other won't come back."""
    it = attempt("refuse", nodes=2, environment={Env.IN_PLACE_RESTARTS: 3})
    it.start(0)
    it.start(1)
    codes = sorted(it.end(index).exit_code for index in range(2))
    assert codes == [64, 76], it.log(0) + it.log(1)


def test_a_crash_on_one_worker_is_made_good_on_both(attempt: Start) -> None:
    it = attempt("crash_once", nodes=2, environment={Env.IN_PLACE_RESTARTS: 1})
    it.start(0)
    it.start(1)
    assert [it.end(index).exit_code for index in range(2)] == [0, 0], it.log(0) + it.log(1)


def test_a_worker_that_sees_the_storage_late_finds_the_result_while_it_waits(attempt: Start, tmp_path: Path) -> None:
    it = attempt("succeed", nodes=2)
    it.start(1)
    it.wait_for(lambda: it.progress(1) is not None)
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    StageFiles(build_stage(tmp_path)).write_result(result)
    assert it.end(1).exit_code == 0


def children(pid: int) -> list[int]:
    """The ranks of a worker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for p in map(int, found) if b"tests.support.ranks.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_gone(pids: list[int]) -> None:
    until = time.monotonic() + 10
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < until, "a rank outlives its worker"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"
