"""`sailvl operator` as child processes, and a witness who watches what they make of runs."""

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
from tests.support.live.api import until
from tests.support.live.proxy import Background

ROOT = Path(__file__).parents[3]
QUICK: dict[str, object] = {
    "failure-settle-seconds": 1,
    "backoff-seconds": 1,
    "lease-duration-seconds": 4,
    "lease-renew-deadline-seconds": 3,
    "lease-renew-interval-seconds": 1,
}
"""Flags."""

_CALL = "import sys; from sailvl_operator.cli.main import main; sys.exit(main())"


class Replica:
    """One process. Use as a context manager: what still runs at the end must end well when it is told to."""

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
        self._flags = QUICK | scope | given
        self._command = [*before, sys.executable, "-c", f"{prelude}\n{_CALL}", "operator"]
        self._environment = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer")),
        }
        self.identity, self.log = identity, folder / f"{identity}.log"
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = [f"--{name}={value}" for name, value in (self._flags | {"metrics-port": self.port}).items()]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*self._command, *flags], env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def until_ready(self) -> None:
        until(lambda: self.get("/readyz") == "ok", told=self.last_words)

    def until_leading(self, seconds: float = 30.0) -> None:
        until(self.is_leading, seconds, told=self.last_words)

    def is_leading(self) -> bool:
        return self.metric("sailvl_operator_leading") == 1

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str) -> str:
        """The answer's text, also of a probe that fails; empty: there is none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return str(error.read().decode())
        except OSError:
            return ""

    def metric(self, name: str) -> float:
        """The sum of its series."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout=20)

    def last_words(self) -> str:
        return self.log.read_text()[-4000:]

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_alive():
            code = self.end(signal.SIGTERM if kind is None else signal.SIGKILL)
            assert kind is not None or code == 0, self.last_words()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A Job, as it was first seen."""

    uid: str
    stage: str
    attempt: int
    version: int


class Witness:
    """Watches the Jobs and runs of namespaces past any proxy, from now on. Use as a context manager."""

    def __init__(self, kubeconfig: str, namespaces: Sequence[str]) -> None:
        self._credentials, self._namespaces = load_credentials(kubeconfig), namespaces
        self._jobs: dict[tuple[str, str], dict[str, _Made]] = defaultdict(dict)
        self._noted: dict[tuple[str, str, str, int], int] = {}
        self._watches: list[asyncio.Future[None]] = []

    def __enter__(self) -> Witness:
        self._background = Background()
        self._background.call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._background.call(self._client.__aexit__())
        self._background.close()
        for watch in self._watches:
            assert watch.cancelled(), watch.exception()

    def attempts(self, namespace: str, run: str) -> dict[str, list[int]]:
        """Of each stage the attempts for which a Job was ever made, as often as one was."""
        found: dict[str, list[int]] = defaultdict(list)
        for job in self._jobs[namespace, run].values():
            found[job.stage].append(job.attempt)
        return {stage: sorted(attempts) for stage, attempts in found.items()}

    def find_unnoted(self, namespace: str, run: str) -> list[str]:
        """Later attempts whose Job was made before the status had their number."""
        return [
            f"{job.stage} {job.attempt}"
            for job in self._jobs[namespace, run].values()
            if job.attempt > 1 and self._noted.get((namespace, run, job.stage, job.attempt), job.version) >= job.version
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
        see = self._see_job if resource is resources.JOBS else self._see_run
        while True:
            try:
                events = self._client.watch(resource, namespace, selector=selector, resource_version=version)
                async for type_, raw in events:
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        see(raw)
            except ApiError:
                await asyncio.sleep(0.1)

    def _see_job(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        labels, key = metadata["labels"], (metadata["namespace"], metadata["labels"][names.LABEL_RUN])
        made = _Made(
            uid=metadata["uid"],
            stage=labels[names.LABEL_STAGE],
            attempt=int(labels[names.LABEL_ATTEMPT]),
            version=int(metadata["resourceVersion"]),
        )
        self._jobs[key].setdefault(made.uid, made)

    def _see_run(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        for stage in raw.get("status", {}).get("stages", []):
            key = metadata["namespace"], metadata["name"], stage["name"], stage.get("attempt", 0)
            self._noted.setdefault(key, int(metadata["resourceVersion"]))
