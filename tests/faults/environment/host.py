"""The processes of workers and of the cluster on the host; workers are found by their container's control group.

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
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContainer:
    """A pod of a run whose worker container runs."""

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
        """The host's PID of the container's PID 1."""
        return next(pid for pid in list_pids(self.container) if _inner_pid(pid) == 1)

    @property
    def ranks(self) -> list[int]:
        """The host's PIDs of the ranks."""
        return [pid for pid in list_pids(self.container) if RANK in _command(pid)]


def list_workers(pods: list[dict[str, Any]]) -> list[WorkerContainer]:
    """Return the running workers among some pods, in order of stage, attempt and index."""
    found = [worker for pod in pods if (worker := _parse(pod)) is not None]
    return sorted(found, key=lambda worker: (worker.stage, worker.attempt, worker.index))


def kill(pids: list[int]) -> None:
    """Send SIGKILL to processes; those that have ended are ignored."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def list_containers(pods: list[dict[str, Any]]) -> list[str]:
    """Return the ids of all running containers of some pods."""
    states = [c for pod in pods for c in pod.get("status", {}).get("containerStatuses", [])]
    return [c["containerID"].partition("://")[2] for c in states if "running" in c["state"]]


def list_pids(container: str) -> list[int]:
    """Return the host's PIDs of a container's processes."""
    return [int(pid) for pid in (find_cgroup(container, "memory") / "cgroup.procs").read_text().split()]


def find_cgroup(container: str, controller: str) -> Path:
    """Return the folder of a container's control group; version 2 has one for all controllers."""
    tree = CGROUP_ROOT / controller if (CGROUP_ROOT / controller).is_dir() else CGROUP_ROOT
    for folder, folders, _ in os.walk(tree):
        if container in folders:
            return Path(folder) / container
    raise LookupError(f"no control group of container {container} below {tree}")


def call_containerd(node: str, *arguments: str) -> str:
    """Run `ctr` against a node's containerd and return its output."""
    command = ["ctr", "-a", str(STATE / node / "containerd.sock"), "-n", "k8s.io", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def remove_images(node: str, repository: str) -> None:
    """Remove a repository's images from a node, so that it has to pull them again."""
    names = [name for name in call_containerd(node, "images", "ls", "-q").split() if f"/{repository}" in name]
    if names:
        call_containerd(node, "images", "rm", "--sync", *names)


def call_cluster_script(*arguments: str) -> None:
    """Run the script that creates the cluster and its nodes."""
    done = subprocess.run([SCRIPT, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class ClusterProcess:
    """A process of the cluster, by its name in the state folder; it can be killed and restarted."""

    def __init__(self, name: str) -> None:
        self._pid_file = STATE / f"{name}.pid"
        self._log = STATE / f"log/{name}.log"
        self._pid = int(self._pid_file.read_text())
        self._command = _command(self._pid).decode().rstrip("\0").split("\0")
        assert str(STATE) in " ".join(self._command), self._command

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        kill([self._pid])
        while Path(f"/proc/{self._pid}/exe").exists():
            time.sleep(0.01)

    def start(self) -> None:
        """Start the process with its old command line, detached from this one."""
        with self._log.open("ab") as log:
            started = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._pid_file.write_text(f"{started.pid}\n")
        started.returncode = 0  # no caller waits for it


def _parse(pod: dict[str, Any]) -> WorkerContainer | None:
    labels, status = pod["metadata"]["labels"], pod.get("status", {})
    for container in status.get("containerStatuses", []):
        if container["name"] == "worker" and "running" in container["state"]:
            return WorkerContainer(
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
    """Return a process's command line, or nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _inner_pid(pid: int) -> int:
    """Return a process's PID in its innermost namespace."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])
