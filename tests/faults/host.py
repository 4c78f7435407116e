"""Workers as the machine below their nodes sees them: processes and control groups, found by the container's id.

Only for the cluster of `make cluster`, whose nodes are processes of this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.live.cluster import ROOT, SCRIPT

STATE = ROOT / "build/cluster"
RANK = b"sailvl_trainer.rank.main"
TREES = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One pod of a run, whose container runs."""

    name: str
    uid: str
    node: str
    ip: str
    stage: str
    attempt: int
    index: int
    container: str

    @property
    def agent(self) -> int:
        """The container's PID 1."""
        return next(pid for pid in list_pids(self.container) if _inner_pid(pid) == 1)

    @property
    def ranks(self) -> list[int]:
        return [pid for pid in list_pids(self.container) if RANK in _command(pid)]


def list_workers(pods: list[dict[str, Any]]) -> list[Worker]:
    """Those whose container runs, by index."""
    found = [worker for pod in pods if (worker := _parse(pod)) is not None]
    return sorted(found, key=lambda worker: (worker.stage, worker.attempt, worker.index))


def kill(pids: list[int]) -> None:
    """SIGKILL; who has gone meanwhile has gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def list_containers(pods: list[dict[str, Any]]) -> list[str]:
    """Ids of all that run in some pods."""
    states = [c for pod in pods for c in pod.get("status", {}).get("containerStatuses", [])]
    return [c["containerID"].partition("://")[2] for c in states if "running" in c["state"]]


def list_pids(container: str) -> list[int]:
    """Every process of a container, as this machine numbers them."""
    return [int(pid) for pid in (find_group(container, "memory") / "cgroup.procs").read_text().split()]


def find_group(container: str, controller: str) -> Path:
    """A container's control group; with version 2 one for all controllers."""
    tree = TREES / controller if (TREES / controller).is_dir() else TREES
    for folder, folders, _ in os.walk(tree):
        if container in folders:
            return Path(folder) / container
    raise LookupError(f"no control group of container {container} below {tree}")


def call_containerd(node: str, *words: str) -> str:
    """`ctr` at a node's containerd."""
    command = ["ctr", "-a", str(STATE / node / "containerd.sock"), "-n", "k8s.io", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def forget_images(node: str, repository: str) -> None:
    """A node has to pull a repository's images again."""
    names = [name for name in call_containerd(node, "images", "ls", "-q").split() if f"/{repository}" in name]
    if names:
        call_containerd(node, "images", "rm", "--sync", *names)


def call_script(*words: str) -> None:
    """The script that made the cluster."""
    done = subprocess.run([SCRIPT, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class Part:
    """A process of the cluster, by its name in the state folder; it can be killed, and started again as it was."""

    def __init__(self, name: str) -> None:
        self._pid_file = STATE / f"{name}.pid"
        self._log = STATE / f"log/{name}.log"
        self._pid = int(self._pid_file.read_text())
        self._command = _command(self._pid).decode().rstrip("\0").split("\0")
        assert str(STATE) in " ".join(self._command), self._command

    def kill(self) -> None:
        kill([self._pid])
        while Path(f"/proc/{self._pid}/exe").exists():
            time.sleep(0.01)

    def start(self) -> None:
        """In the background, outliving this process."""
        with self._log.open("ab") as log:
            started = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._pid_file.write_text(f"{started.pid}\n")
        started.returncode = 0  # nobody waits for it


def _parse(pod: dict[str, Any]) -> Worker | None:
    labels, status = pod["metadata"]["labels"], pod.get("status", {})
    for container in status.get("containerStatuses", []):
        if container["name"] == "worker" and "running" in container["state"]:
            return Worker(
                name=pod["metadata"]["name"],
                uid=pod["metadata"]["uid"],
                node=pod["spec"]["nodeName"],
                ip=status.get("podIP", ""),
                stage=labels["sailvl.dev/stage"],
                attempt=int(labels["sailvl.dev/attempt"]),
                index=int(labels["batch.kubernetes.io/job-completion-index"]),
                container=container["containerID"].partition("://")[2],
            )
    return None


def _command(pid: int) -> bytes:
    """Empty for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _inner_pid(pid: int) -> int:
    """Its number in its innermost namespace."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])
