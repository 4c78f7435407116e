"""A control plane for tests that kill parts of it: whole runs of `crash_points.py` on it, whose kubelet and witness
outlive whatever happens to the API server. Runs beside the test, which stays free to wait.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.errors import ApiError, Gone
from tests.support.live.api import NAMESPACES, Object, build_object, until
from tests.support.live.control_plane import control_plane
from tests.support.live.crash_points import (
    RUN,
    SPEC,
    Case,
    Kubelet,
    Witness,
    expected_children,
    find_differences,
    normalise,
)
from tests.support.live.proxy import Background

ROOT = Path(__file__).parents[3]
CRD = f"{names.PLURAL}.{names.GROUP}"
WATCHED = (resources.JOBS, resources.PODS, resources.SERVICES, resources.CLAIMS, resources.RUNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """A control plane with our resource, and a client of it."""

    kubeconfig: Path
    client: Client
    background: Background
    restarted: ExitStack = field(default_factory=ExitStack)

    def create(self, resource: resources.Resource, body: Object) -> None:
        self.background.call(self.client.create(resource, body["metadata"].get("namespace", ""), body))

    def begin(self, case: Case) -> None:
        """Its run."""
        self.create(
            resources.RUNS, build_object(names.KIND, RUN, names.API_VERSION, namespace=case.namespace, spec=SPEC)
        )

    def kill(self, program: str, *, seconds: float) -> None:
        """Without a word; after some seconds it is started as it was."""
        [(pid, command)] = _find_processes(program, self.kubeconfig.parent)
        os.kill(pid, signal.SIGKILL)
        time.sleep(seconds)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.restarted.callback(process.wait)
        self.restarted.callback(process.kill)
        until(lambda: _find_processes(program, self.kubeconfig.parent))

    @contextmanager
    def watching(self, cases: Sequence[Case]) -> Iterator[None]:
        """The cases' namespaces exist, are watched, and have a kubelet."""
        for case in cases:
            self.create(NAMESPACES, build_object("Namespace", case.namespace))
        watches = self.background.call(_begin_watches(self.client, cases))
        try:
            yield
        finally:
            self.background.call(_end_watches(watches))


@contextmanager
def open_plane(binaries: Path, folder: Path) -> Iterator[Plane]:
    """One that runs meanwhile."""
    with control_plane(binaries, folder) as kubeconfig:
        kubectl = [binaries / "kubectl", f"--kubeconfig={kubeconfig}"]
        subprocess.run([*kubectl, "apply", "--server-side", "-f", ROOT / "crds/sailvlruns.yaml"], check=True)
        wait = [*kubectl, "wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=30s"]
        until(lambda: subprocess.run(wait, check=False).returncode == 0)  # it fails where there is no condition yet
        background, client = Background(), Client(load_credentials(str(kubeconfig)))
        plane = Plane(kubeconfig=kubeconfig, client=client, background=background)
        background.call(client.__aenter__())
        try:
            with plane.restarted:
                yield plane
        finally:
            background.call(client.__aexit__())
            background.close()


def judge(case: Case, wanted: Case) -> str:
    """What is wrong with its end; empty: nothing. A pod made twice is its controller's: its answers are lost, too."""
    differences = find_differences(normalise(case.run["status"]), normalise(wanted.run["status"]))
    doubled = [name for name in case.made - expected_children() if not name.startswith("pods/")]
    missing = expected_children() - case.made
    return "; ".join([*differences, *(f"{name} too often" for name in doubled), *(f"no {name}" for name in missing)])


class _SteadyKubelet(Kubelet):
    """One that says what it has to say, sooner or later."""

    async def _patch(self, *words: Any, **more: Any) -> None:
        while True:
            try:
                await super()._patch(*words, **more)
                return
            except ApiError:
                await asyncio.sleep(0.2)


class _SteadyWitness(Witness):
    """One that lists again when its version is too old."""

    async def follow(self, resource: resources.Resource) -> None:
        version = ""
        while True:
            try:
                version = version or await self._read(resource)
                async for type_, raw in self._client.watch(
                    resource, selector=_selector(resource), resource_version=version
                ):
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        await self._see(resource, type_, raw)
            except Gone:
                version = ""
            except ApiError:
                await asyncio.sleep(0.1)

    async def _read(self, resource: resources.Resource) -> str:
        version = ""
        async for items, version in self._client.list_pages(resource, selector=_selector(resource)):  # noqa: B007
            for item in items:
                await self._see(resource, "ADDED", item)
        return version


def _selector(resource: resources.Resource) -> str:
    return "" if resource is resources.RUNS else names.MANAGED_SELECTOR


async def _begin_watches(client: Client, cases: Sequence[Case]) -> list[asyncio.Future[None]]:
    witness = _SteadyWitness(client, cases, _SteadyKubelet(client))
    return [asyncio.ensure_future(witness.follow(resource)) for resource in WATCHED]


async def _end_watches(watches: Sequence[asyncio.Future[None]]) -> None:
    for watch in watches:
        watch.cancel()
    for watch in watches:
        with suppress(asyncio.CancelledError):
            await watch


def _find_processes(program: str, folder: Path) -> list[tuple[int, list[str]]]:
    """Those that keep their things in this folder: number and command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = path.read_text().split("\0")[:-1]
            if words and words[0].endswith(f"/{program}") and any(f"={folder}/" in word for word in words):
                found.append((int(path.parent.name), words))
    return found
