"""The workers of one attempt as real processes on this machine, for tests of how attempts end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sailvl_trainer.contract import Env, Progress, Stage, Termination
from sailvl_trainer.storage.codec import decode, encode
from tests.support.builders.worker import free_port

SCENARIOS = "tests.support.ranks.worker"
"""Module of ranks that do what the variable SCENARIO says."""
TRAINER = "sailvl_trainer.rank.main"
"""Module of ranks that run the stage."""
WORKER = """
import os, sys
if sys.argv[2]:
    open(sys.argv[2] + "/cgroup.procs", "w").write(str(os.getpid()))
from sailvl_trainer.worker import main as worker, reused_result
worker.MIN_START_SLACK_SECONDS = int(os.environ.get("MIN_START_SLACK_SECONDS", worker.MIN_START_SLACK_SECONDS))
if "VERIFICATION_SECONDS" in os.environ:
    reused_result.VERIFICATION_SECONDS = float(os.environ["VERIFICATION_SECONDS"])
worker.main(sys.argv[1])
"""
"""A worker's entry point that takes the module of its ranks and a control group to join."""


@dataclass(kw_only=True)
class WorkerProcesses:
    """Workers that share this machine; every one that is still running is killed when `resources` are closed."""

    folder: Path
    """Directory of stage config, logs, scratch directories and termination messages."""
    stage: Stage
    resources: ExitStack
    nodes: int = 1
    environment: dict[str, object] = field(default_factory=dict)
    """Variables of all workers."""
    rank_module: str = SCENARIOS
    cgroup: Path | None = None
    """Control group for the workers; None leaves them in the test's own."""
    timeout_seconds: int = 60
    """Longest time that a wait for the workers may take."""
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    rendezvous_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)

    def start(self, index: int = 0, **environment: object) -> None:
        """Start one worker."""
        stage_file = self.folder / "stage.json"
        stage_file.write_bytes(encode(self.stage))
        log = self.resources.enter_context((self.folder / f"log-{index}").open("wb"))
        variables = {
            Env.STAGE_FILE: stage_file,
            Env.NODES: self.nodes,
            Env.NODE_RANK: index,
            Env.RENDEZVOUS_PORT: self.rendezvous_port,
            Env.RENDEZVOUS_SECRET: "1a2b",
            Env.METRICS_PORT: self.metrics_port,
            Env.METRICS_PORT_OFFSET: index,
            Env.TERMINATION_LOG: self.folder / f"termination-{index}",
            Env.SCRATCH: self.folder / f"scratch-{index}",
            "OMP_NUM_THREADS": 1,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        is_real = self.rank_module == TRAINER and "VERIFICATION_SECONDS" not in self.environment
        command = ["-m", "sailvl_trainer"] if is_real else ["-c", WORKER, self.rank_module, str(self.cgroup or "")]
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {k: str(v) for k, v in (variables | self.environment | environment).items()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.processes[index] = process
        self.resources.callback(_kill, process)

    def start_all(self) -> None:
        """Start all workers."""
        for index in range(self.nodes):
            self.start(index)

    def read_progress(self, index: int = 0) -> Progress | None:
        """Return the progress of a worker, or None if it has written none."""
        path = self.folder / f"scratch-{index}" / "progress.json"
        return decode(Progress, path.read_bytes()) if path.exists() else None

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; fail if a worker ends before."""
        until = time.monotonic() + self.timeout_seconds
        while not condition():
            assert time.monotonic() < until, self.read_log()
            assert all(p.poll() is None for p in self.processes.values()), self.read_log()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Wait until the worker of index 0 has done a step."""
        self.wait_for(lambda: (found := self.read_progress()) is not None and found.step >= step)

    def wait_for_end(self, index: int = 0) -> Termination:
        """Wait until a worker exits and return its termination message, which has to name its exit code."""
        code = self.processes[index].wait(self.timeout_seconds)
        termination = decode(Termination, (self.folder / f"termination-{index}").read_bytes())
        assert termination.exit_code == code, self.read_log(index)
        return termination

    def wait_for_all(self) -> list[Termination]:
        """Wait until all workers exit and return their termination messages by index."""
        return [self.wait_for_end(index) for index in range(self.nodes)]

    def kill_all(self) -> None:
        """Kill the first process of every worker, which is PID 1 of its container."""
        for process in self.processes.values():
            _kill(process)

    def find_ranks(self, index: int = 0) -> list[int]:
        """Return the process IDs of a worker's ranks."""
        pid, name = self.processes[index].pid, self.rank_module.encode()
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [child for child in children if name in Path(f"/proc/{child}/cmdline").read_bytes()]

    def read_log(self, index: int = 0) -> str:
        """Return the output of a worker and its ranks."""
        return (self.folder / f"log-{index}").read_text()

    def read_logs(self) -> str:
        """Return the output of all workers."""
        return "".join(self.read_log(index) for index in self.processes)

    def get(self, path: str, index: int = 0) -> str:
        """Return the body of a GET request to a worker's HTTP server."""
        with urllib.request.urlopen(f"http://localhost:{self.metrics_port + index}{path}", timeout=5) as response:
            return str(response.read().decode())


def wait_until_gone(pids: list[int]) -> None:
    """Wait until no process is alive; zombies count as gone."""
    until = time.monotonic() + 10
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < until, "a rank outlives its worker"
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"
