"""`sailvl operator` as child processes, and an independent record of the attempts that they start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.errors import ApiError
from tests.support.live.api import wait_until
from tests.support.live.proxy import BackgroundLoop

ROOT = Path(__file__).parents[3]
FAST_FLAGS: dict[str, object] = {
    "failure-settle-seconds": 1,
    "backoff-seconds": 1,
    "lease-duration-seconds": 4,
    "lease-renew-deadline-seconds": 3,
    "lease-renew-interval-seconds": 1,
}
"""Flags with short times, for tests."""

_CALL = "import sys; from sailvl_operator.cli.main import main; sys.exit(main())"


class OperatorReplica:
    """One operator process. Use as a context manager: if the process still runs at the end, it must exit with 0."""

    def __init__(
        self,
        kubeconfig: Path | str,
        namespaces: Sequence[str],
        folder: Path,
        *,
        identity: str = "test",
        prelude: str = "",
        before: Sequence[str] = (),
        **flags: object,
    ) -> None:
        scope = {"namespaces": ",".join(namespaces), "lease-namespace": namespaces[0], "identity": identity}
        given = {name.replace("_", "-"): value for name, value in flags.items()}
        self._flags = FAST_FLAGS | scope | given
        self._command = [*before, sys.executable, "-c", f"{prelude}\n{_CALL}", "operator"]
        self._environment = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer")),
        }
        self.identity, self.log = identity, folder / f"{identity}.log"
        self.start()

    def start(self) -> None:
        """Start the process on a free metrics port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = [f"--{name}={value}" for name, value in (self._flags | {"metrics-port": self.port}).items()]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*self._command, *flags], env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def wait_until_ready(self) -> None:
        """Wait until the readiness probe succeeds."""
        wait_until(lambda: self.get("/readyz") == "ok", describe=self.read_log_tail)

    def wait_until_leading(self, seconds: float = 30.0) -> None:
        """Wait until the process holds the lease."""
        wait_until(self.is_leading, seconds, describe=self.read_log_tail)

    def is_leading(self) -> bool:
        """Return whether the process holds the lease."""
        return self.read_metric("sailvl_operator_leading") == 1

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def get(self, path: str) -> str:
        """Return the text of a response, also of a failing probe, or an empty string if there is none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return str(error.read().decode())
        except OSError:
            return ""

    def read_metric(self, name: str) -> float:
        """Return the sum of all series whose name and labels begin with `name`."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self, signal_: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end of the process and return its exit code."""
        self.process.send_signal(signal_)
        return self.process.wait(timeout=20)

    def read_log_tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text()[-4000:]

    def __enter__(self) -> OperatorReplica:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_alive():
            code = self.stop(signal.SIGTERM if kind is None else signal.SIGKILL)
            assert kind is not None or code == 0, self.read_log_tail()


@dataclass(frozen=True, kw_only=True, slots=True)
class _CreatedJob:
    """A Job at its first observation."""

    uid: str
    stage: str
    attempt: int
    version: int


class AttemptRecorder:
    """Records Jobs and runs of some namespaces from now on, without any proxy. Use as a context manager."""

    def __init__(self, kubeconfig: str, namespaces: Sequence[str]) -> None:
        self._credentials, self._namespaces = load_credentials(kubeconfig), namespaces
        self._jobs: dict[tuple[str, str], dict[str, _CreatedJob]] = defaultdict(dict)
        self._status_versions: dict[tuple[str, str, str, int], int] = {}
        self._watches: list[asyncio.Future[None]] = []

    def __enter__(self) -> AttemptRecorder:
        self._background = BackgroundLoop()
        self._background.call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._background.call(self._client.__aexit__())
        self._background.close()
        for watch in self._watches:
            assert watch.cancelled(), watch.exception()

    def list_attempts(self, namespace: str, run: str) -> dict[str, list[int]]:
        """Return the attempts of each stage, one entry per Job that was ever created."""
        found: dict[str, list[int]] = defaultdict(list)
        for job in self._jobs[namespace, run].values():
            found[job.stage].append(job.attempt)
        return {stage: sorted(attempts) for stage, attempts in found.items()}

    def list_unrecorded_attempts(self, namespace: str, run: str) -> list[str]:
        """Return the later attempts whose Job was created before the status showed their number."""
        return [
            f"{job.stage} {job.attempt}"
            for job in self._jobs[namespace, run].values()
            if job.attempt > 1
            and self._status_versions.get((namespace, run, job.stage, job.attempt), job.version) >= job.version
        ]

    async def _start(self) -> None:
        self._client = await Client(self._credentials).__aenter__()
        for namespace in self._namespaces:
            for resource, selector in ((resources.JOBS, names.MANAGED_SELECTOR), (resources.RUNS, "")):
                version = await self._list(resource, namespace)
                self._watches.append(asyncio.ensure_future(self._watch(resource, namespace, selector, version)))

    async def _list(self, resource: Resource, namespace: str) -> str:
        version = ""
        async for _, version in self._client.list_pages(resource, namespace):  # noqa: B007
            pass
        return version

    async def _watch(self, resource: Resource, namespace: str, selector: str, version: str) -> None:
        record = self._record_job if resource is resources.JOBS else self._record_run
        while True:
            try:
                events = self._client.watch(resource, namespace, selector=selector, resource_version=version)
                async for type_, raw in events:
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        record(raw)
            except ApiError:
                await asyncio.sleep(0.1)

    def _record_job(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        labels, key = metadata["labels"], (metadata["namespace"], metadata["labels"][names.LABEL_RUN])
        created = _CreatedJob(
            uid=metadata["uid"],
            stage=labels[names.LABEL_STAGE],
            attempt=int(labels[names.LABEL_ATTEMPT]),
            version=int(metadata["resourceVersion"]),
        )
        self._jobs[key].setdefault(created.uid, created)

    def _record_run(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        for stage in raw.get("status", {}).get("stages", []):
            key = metadata["namespace"], metadata["name"], stage["name"], stage.get("attempt", 0)
            self._status_versions.setdefault(key, int(metadata["resourceVersion"]))
