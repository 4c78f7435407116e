"""The measured operators, each in its own process. To measure another one, add a class with the same methods."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bench.operator.control_plane import ROOT, ControlPlane, cpu_seconds

SETTLE_SECONDS = 1.0
"""Settling time of our operator in the benchmark (`--failure-settle-seconds`), in seconds."""
_PORT = 18090
_DATA_LIMIT = 2 << 30
"""Bytes of private memory that an operator may allocate, so that one without bounds doesn't take the machine's."""
_WRITES = ("create", "patch", "delete", "deletecollection")
"""Verbs that count as writes. Renewals of the Lease are `update` and do not count."""


class Peer(Protocol):
    """An operator that creates Jobs for runs."""

    name: str
    process: subprocess.Popen[bytes]

    async def start(self) -> None:
        """Start the process, and wait until it is ready."""

    async def stop(self) -> None:
        """End the process with SIGTERM, as a rollout does."""


class _Process:
    """Process handling that the operators share."""

    name = ""
    process: subprocess.Popen[bytes]

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def cpu_seconds(self) -> float:
        """Return the user and system time so far, in seconds."""
        return cpu_seconds(self.process.pid)

    def memory_mib(self) -> float:
        """Return the peak resident memory in MiB; 0 if the process has ended."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found is not None else 0.0

    def writes(self) -> int:
        """Return the number of writes so far; 0 if the operator has no such metric."""
        return 0

    async def stop(self) -> None:
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)

    def _spawn(self, *command: str) -> None:
        paths = os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer"))
        environment = os.environ | {"KUBECONFIG": str(self._plane.kubeconfig), "PYTHONPATH": paths}
        with (self._plane.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
            resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (_DATA_LIMIT, _DATA_LIMIT))


class SailVL(_Process):
    """`sailvl operator` with default settings, except for the settling time, the port and the identity in the Lease.

    `replica`: number of the replica; the first one to be started leads.
    """

    def __init__(self, plane: ControlPlane, replica: int = 0) -> None:
        super().__init__(plane)
        self.name = f"sailvl-{replica}"
        self._port = _PORT + replica

    def is_ready(self) -> bool:
        """Return whether the replica has listed all objects."""
        return self._fetch("/readyz") == "ok"

    async def start(self) -> None:
        self.spawn()
        await until(self.is_ready, 60)

    def spawn(self) -> None:
        """Start the process without waiting."""
        flags = ["--metrics-port", str(self._port), "--failure-settle-seconds", str(SETTLE_SECONDS)]
        flags += ["--identity", self.name]
        self._spawn("-c", "import sys; from sailvl_operator.cli.main import main; sys.exit(main())", "operator", *flags)

    def writes(self) -> int:
        """Return the number of writes so far, with Events and without renewals of the Lease."""
        return round(sum(value for verb, value in self._calls() if verb in _WRITES))

    def reconciled(self) -> tuple[int, int]:
        """Return the number of reconciles so far and the depth of the work queue; -1 if it is unknown."""
        body = self._metrics()
        done = sum(float(v) for v in re.findall(r"^sailvl_operator_reconciles_total{[^}]*} (\S+)", body, re.M))
        depth = re.search(r"^sailvl_operator_queue_depth (\S+)", body, re.M)
        return round(done), round(float(depth[1])) if depth else -1

    def _calls(self) -> list[tuple[str, float]]:
        body = self._metrics()
        pattern = r'^sailvl_operator_api_calls_total{code="(?:[^"]*)",verb="([^"]*)"} (\S+)'
        return [(verb, float(value)) for verb, value in re.findall(pattern, body, re.M)]

    def _metrics(self) -> str:
        return self._fetch("/metrics/operator")

    def _fetch(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as response:
                body: bytes = response.read()
                return body.decode()
        except (urllib.error.URLError, OSError):
            return ""


class NaiveKopf(_Process):
    """The operator of `naive_kopf.py`, written as kopf's tutorial teaches."""

    name = "naive-kopf"

    async def start(self) -> None:
        script = Path(__file__).with_name("naive_kopf.py")
        self._spawn("-m", "kopf", "run", "--all-namespaces", "--standalone", str(script))
        await asyncio.sleep(8)


async def until(condition: Callable[[], object], seconds: float, pause: float = 0.2) -> None:
    """Poll a condition in a thread until it is true. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(pause)
