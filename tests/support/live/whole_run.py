"""A whole run on a real cluster: follows it with kubectl, records it, and injects faults into it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.support.live.cluster import KUBECTL_SECONDS, Kubectl

RUN = "demo"
KILL_RANK = (
    "import os, signal, pathlib\n"
    "ranks = [int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
    "         and b'sailvl_trainer.rank.main' in (p / 'cmdline').read_bytes()]\n"
    "os.kill(min(ranks), signal.SIGKILL)\n"
)


@dataclass
class WholeRun:
    """The observations of a run, and where it stores its results."""

    storage: Path
    namespace: str
    status: dict[str, Any] = field(default_factory=dict)
    columns: list[list[str]] = field(default_factory=list)
    """Cells of `kubectl get svr`: the header, then a row for each change of anything but the age."""
    jobs: dict[str, str] = field(default_factory=dict)
    """uid of every Job ever observed, by name."""
    recreated_jobs: list[str] = field(default_factory=list)
    """Names under which a second Job was observed."""
    nodes: dict[str, set[str]] = field(default_factory=dict)
    """Nodes of each Job's pods."""
    faults: list[tuple[float, str]] = field(default_factory=list)
    """Unix time in seconds and description of each injected fault."""

    def stage(self, name: str) -> dict[str, Any]:
        """Return a stage's status."""
        found: dict[str, Any] = next(s for s in self.status["stages"] if s["name"] == name)
        return found

    def is_finished(self) -> bool:
        """Return whether the run succeeded or failed."""
        return any(c["status"] == "True" and c["type"] in ("Succeeded", "Failed") for c in self.status["conditions"])

    def has_reached(self, stage: str, step: int) -> bool:
        """Return whether a stage runs and has reached a step."""
        found = [s for s in self.status.get("stages", []) if s["name"] == stage and s["state"] == "Running"]
        return bool(found) and (found[0].get("progress") or {}).get("step", 0) >= step


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledFault:
    """A fault to be injected when a stage has reached a step."""

    stage: str
    step: int
    title: str
    inject: Callable[[Kubectl, WholeRun], None]


def follow(kubectl: Kubectl, whole_run: WholeRun, faults: list[ScheduledFault], limit_seconds: float) -> None:
    """Follow the run to its end and inject each fault in turn; fail with a description after `limit_seconds`."""
    pending = list(faults)
    until = time.monotonic() + limit_seconds
    while time.monotonic() < until:
        observe(kubectl, whole_run)
        if pending and whole_run.has_reached(pending[0].stage, pending[0].step):
            fault = pending.pop(0)
            whole_run.faults.append((time.time(), fault.title))
            fault.inject(kubectl, whole_run)
        if whole_run.status.get("conditions") and whole_run.is_finished():
            return
        time.sleep(1)
    table, described = format_table(whole_run.columns), describe_run(kubectl, whole_run.namespace, RUN)
    raise AssertionError(f"the run did not end within {limit_seconds:.0f} s\n{table}\n{described}")


def wait_for_success(kubectl: Kubectl, namespace: str, run: str, limit_seconds: int) -> None:
    """Wait until a run has succeeded; fail after `limit_seconds`, with what its workers were doing."""
    wait = "-n", namespace, "wait", "--for=condition=Succeeded", f"svr/{run}", f"--timeout={limit_seconds}s"
    done = kubectl(*wait, limit_seconds=limit_seconds + KUBECTL_SECONDS)
    if done.returncode:
        described = describe_run(kubectl, namespace, run)
        raise AssertionError(f"run {run} did not succeed within {limit_seconds} s: {done.stderr}\n{described}")


def describe_run(kubectl: Kubectl, namespace: str, run: str) -> str:
    """Return what kubectl prints about a run: its status, pods, events and logs, and the nodes.

    The times in the logs show whether workers are slow or hang.
    """
    in_namespace, selector = ("-n", namespace), ("-l", f"sailvl.dev/run={run}")
    commands = [
        (*in_namespace, "describe", "svr", run),
        (*in_namespace, "get", "jobs,pods", "-o", "wide"),
        (*in_namespace, "get", "events", "--sort-by=.lastTimestamp"),
        (*in_namespace, "logs", *selector, "--all-containers", "--prefix", "--timestamps", "--tail=50"),
        ("get", "nodes", "-o", "wide"),
    ]
    outputs = []
    for command in commands:
        done = kubectl(*command)
        outputs.append(f"$ kubectl {' '.join(command)}\n{(done.stdout + done.stderr)[-5000:]}")
    return "\n".join(outputs)


def observe(kubectl: Kubectl, whole_run: WholeRun) -> None:
    """Record the current state of the run, its Jobs and pods."""
    answer = kubectl("-n", whole_run.namespace, "get", "svr", RUN, "-o", "json")
    whole_run.status = json.loads(answer.stdout).get("status", {}) if answer.returncode == 0 else whole_run.status
    for job in json.loads(require_success(kubectl("-n", whole_run.namespace, "get", "jobs", "-o", "json")))["items"]:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        if whole_run.jobs.setdefault(name, uid) != uid:
            whole_run.recreated_jobs.append(name)
    for pod in json.loads(require_success(kubectl("-n", whole_run.namespace, "get", "pods", "-o", "json")))["items"]:
        if pod["spec"].get("nodeName"):
            job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            whole_run.nodes.setdefault(job, set()).add(pod["spec"]["nodeName"])
    rows = split_columns(kubectl("-n", whole_run.namespace, "get", "svr").stdout)
    if len(rows) == 2 and (not whole_run.columns or rows[1][:-1] != whole_run.columns[-1][:-1]):
        whole_run.columns += rows[1 if whole_run.columns else 0 :]


def split_columns(table: str) -> list[list[str]]:
    """Return the cells of a table that kubectl printed, empty ones included: columns start where their headers do."""
    lines = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])] if lines else []
    return [[line[a:b].strip() for a, b in zip_longest(starts, starts[1:])] for line in lines]


def format_table(rows: list[list[str]]) -> str:
    """Return rows as a table, formatted as kubectl does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("   ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def kill_second_rank(kubectl: Kubectl, whole_run: WholeRun) -> None:
    """Send SIGKILL to the rank in the second worker of the running stage."""
    selector = f"sailvl.dev/run={RUN},batch.kubernetes.io/job-completion-index=1"
    running = "--field-selector=status.phase=Running"
    pod = require_success(
        kubectl("-n", whole_run.namespace, "get", "pod", "-l", selector, running, "-o", "name")
    ).strip()
    require_success(kubectl("-n", whole_run.namespace, "exec", pod, "--", "python", "-c", KILL_RANK))


def kill_operators(kubectl: Kubectl, whole_run: WholeRun) -> None:
    """Send SIGKILL to every operator replica from the host, because PID 1 can't be killed inside its container."""
    killed = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command, group = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
        except OSError:
            continue
        if b"sailvl\0operator" in command and "kubepods" in group:
            os.kill(int(folder.name), 9)
            killed += 1
    assert killed, "found no operator process"


def require_success(done: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a command that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout
