"""The operators that are measured, as processes of their own. Another one is another class with the same four names."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bench.operator.control_plane import ROOT, ControlPlane, cpu_seconds

SETTLE_SECONDS = 1.0
"""--failure-settle-seconds of our operator here: the time it waits for the other pods' word on a failure."""
_PORT = 18090
_WRITES = ("create", "patch", "delete", "deletecollection")
"""Verbs that count as writes; the lease's renewals are `update`."""


class Peer(Protocol):
    """An operator that turns a SailVLRun into Jobs."""

    name: str
    process: subprocess.Popen[bytes]

    async def start(self) -> None:
        """Until it serves."""

    async def stop(self) -> None:
        """As a rollout would."""


class _Process:
    """What peers share."""

    name = ""
    process: subprocess.Popen[bytes]

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        return cpu_seconds(self.process.pid)

    def memory_mib(self) -> float:
        """The most memory that it ever held resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def writes(self) -> int:
        """Requests so far that change something, where the operator tells."""
        return 0

    async def stop(self) -> None:
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)

    def _spawn(self, *command: str) -> None:
        paths = os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer"))
        environment = os.environ | {"KUBECONFIG": str(self._plane.kubeconfig), "PYTHONPATH": paths}
        with (self._plane.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)


class SailVL(_Process):
    """`sailvl operator` with its defaults, but for the settling time, which is known, and the port."""

    name = "sailvl"

    async def start(self) -> None:
        self.spawn()
        await until(lambda: self._ask("/readyz") == "ok", 60)

    def spawn(self) -> None:
        """Only begin."""
        flags = ["--metrics-port", str(_PORT), "--failure-settle-seconds", str(SETTLE_SECONDS)]
        self._spawn("-c", "import sys; from sailvl_operator.cli.main import main; sys.exit(main())", "operator", *flags)

    def writes(self) -> int:
        """Requests so far that change something: events are in, the lease's renewals aren't."""
        return round(sum(value for verb, value in self._calls() if verb in _WRITES))

    def reconciled(self) -> tuple[int, int]:
        """Reconciles so far, and keys that wait."""
        body = self._metrics("sailvl_operator_reconciles_total", "sailvl_operator_queue_depth")
        done = sum(float(v) for v in re.findall(r"^sailvl_operator_reconciles_total{[^}]*} (\S+)", body, re.M))
        depth = re.search(r"^sailvl_operator_queue_depth (\S+)", body, re.M)
        return round(done), round(float(depth[1])) if depth else -1

    def _calls(self) -> list[tuple[str, float]]:
        body = self._metrics("sailvl_operator_api_calls_total")
        pattern = r'^sailvl_operator_api_calls_total{code="(?:[^"]*)",verb="([^"]*)"} (\S+)'
        return [(verb, float(value)) for verb, value in re.findall(pattern, body, re.M)]

    def _metrics(self, *names: str) -> str:
        return self._ask("/metrics?" + urllib.parse.urlencode([("name[]", name) for name in names]))

    def _ask(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}{path}", timeout=10) as answer:
                body: bytes = answer.read()
                return body.decode()
        except (urllib.error.URLError, OSError):
            return ""


class NaiveKopf(_Process):
    """What a careful reader of kopf's tutorial writes; see naive_kopf.py."""

    name = "naive-kopf"

    async def start(self) -> None:
        script = Path(__file__).with_name("naive_kopf.py")
        self._spawn("-m", "kopf", "run", "--all-namespaces", "--standalone", str(script))
        await asyncio.sleep(8)


async def until(condition: Callable[[], object], seconds: float, pause: float = 0.2) -> None:
    """Wait for something that a thread can ask for. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(pause)
