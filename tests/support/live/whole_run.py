"""A whole run as it is followed from outside: what is seen of it, and what is done to it on its way."""

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

from tests.support.live.cluster import Kubectl

RUN = "demo"
KILL_RANK = (
    "import os, signal, pathlib\n"
    "ranks = [int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
    "         and b'sailvl_trainer.rank.main' in (p / 'cmdline').read_bytes()]\n"
    "os.kill(min(ranks), signal.SIGKILL)\n"
)


@dataclass
class Story:
    """What was seen of the run, and what it left."""

    storage: Path
    namespace: str
    status: dict[str, Any] = field(default_factory=dict)
    columns: list[list[str]] = field(default_factory=list)
    """Cells of `kubectl get svr`: its header, then a row whenever more than the age changed."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Every Job that was ever seen: name to uid."""
    doubled: list[str] = field(default_factory=list)
    """Jobs that were there twice under one name."""
    nodes: dict[str, set[str]] = field(default_factory=dict)
    """Job to the nodes of its pods."""
    faults: list[tuple[float, str]] = field(default_factory=list)
    """What was done to it, and when (seconds since 1970)."""

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's status."""
        found: dict[str, Any] = next(s for s in self.status["stages"] if s["name"] == name)
        return found

    def is_over(self) -> bool:
        """Whether it succeeded or failed."""
        return any(c["status"] == "True" and c["type"] in ("Succeeded", "Failed") for c in self.status["conditions"])

    def has_come_to(self, stage: str, step: int) -> bool:
        """Whether a stage runs and has done so many steps."""
        found = [s for s in self.status.get("stages", []) if s["name"] == stage and s["state"] == "Running"]
        return bool(found) and (found[0].get("progress") or {}).get("step", 0) >= step


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something done to the run when a stage has come to a step."""

    stage: str
    step: int
    what: str
    do: Callable[[Kubectl, Story], None]


def follow(kubectl: Kubectl, story: Story, faults: list[Fault], limit: float) -> None:
    """Watch the run to its end; each fault is done in its turn. Fails, with all that tells why, after `limit` s."""
    left = list(faults)
    until = time.monotonic() + limit
    while time.monotonic() < until:
        look(kubectl, story)
        if left and story.has_come_to(left[0].stage, left[0].step):
            fault = left.pop(0)
            story.faults.append((time.time(), fault.what))
            fault.do(kubectl, story)
        if story.status.get("conditions") and story.is_over():
            return
        time.sleep(1)
    raise AssertionError(f"the run did not end within {limit:.0f} s\n{explain(kubectl, story)}")


def explain(kubectl: Kubectl, story: Story) -> str:
    """Why a run is where it is, as a person would look for it: itself, its pods, what befell them, the nodes."""
    there = "-n", story.namespace
    questions = [
        (*there, "describe", "svr", RUN),
        (*there, "get", "jobs,pods", "-o", "wide"),
        (*there, "get", "events", "--sort-by=.lastTimestamp"),
        ("get", "nodes", "-o", "wide"),
    ]
    told = [f"$ kubectl {' '.join(question)}\n{kubectl(*question).stdout[-5000:]}" for question in questions]
    return "\n".join([align(story.columns), *told])


def look(kubectl: Kubectl, story: Story) -> None:
    """Add what is new."""
    answer = kubectl("-n", story.namespace, "get", "svr", RUN, "-o", "json")
    story.status = json.loads(answer.stdout).get("status", {}) if answer.returncode == 0 else story.status
    for job in json.loads(require_success(kubectl("-n", story.namespace, "get", "jobs", "-o", "json")))["items"]:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        if story.jobs.setdefault(name, uid) != uid:
            story.doubled.append(name)
    for pod in json.loads(require_success(kubectl("-n", story.namespace, "get", "pods", "-o", "json")))["items"]:
        if pod["spec"].get("nodeName"):
            job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            story.nodes.setdefault(job, set()).add(pod["spec"]["nodeName"])
    rows = split_columns(kubectl("-n", story.namespace, "get", "svr").stdout)
    if len(rows) == 2 and (not story.columns or rows[1][:-1] != story.columns[-1][:-1]):
        story.columns += rows[1 if story.columns else 0 :]


def split_columns(table: str) -> list[list[str]]:
    """The cells of what kubectl prints, empty ones too: they begin where their headers do."""
    lines = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])] if lines else []
    return [[line[a:b].strip() for a, b in zip_longest(starts, starts[1:])] for line in lines]


def align(rows: list[list[str]]) -> str:
    """As kubectl would print them at once."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("   ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def kill_second_rank(kubectl: Kubectl, story: Story) -> None:
    """kill -9 of the rank in the second worker of what runs."""
    selector = f"sailvl.dev/run={RUN},batch.kubernetes.io/job-completion-index=1"
    running = "--field-selector=status.phase=Running"
    pod = require_success(kubectl("-n", story.namespace, "get", "pod", "-l", selector, running, "-o", "name")).strip()
    require_success(kubectl("-n", story.namespace, "exec", pod, "--", "python", "-c", KILL_RANK))


def kill_operators(kubectl: Kubectl, story: Story) -> None:
    """kill -9 of every replica's process, from the nodes: inside its container PID 1 can't be killed."""
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
    assert killed, "no operator's process was found"


def require_success(done: subprocess.CompletedProcess[str]) -> str:
    """Its output; what it said when it failed."""
    assert done.returncode == 0, done.stderr
    return done.stdout
