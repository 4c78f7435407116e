"""A control plane for tests that kill its processes while whole runs of `crash_points.py` are reconciled on it.

The simulated kubelet and the recorder survive failures of the API server; they run in a background thread.
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
from tests.support.live.api import NAMESPACES, Object, build_object, wait_until
from tests.support.live.cluster import install_crd
from tests.support.live.control_plane import start_control_plane
from tests.support.live.crash_points import (
    RUN,
    SPEC,
    CrashCase,
    ObjectRecorder,
    SimulatedKubelet,
    count_expected_objects,
    find_differences,
    strip_times,
)
from tests.support.live.proxy import BackgroundLoop

WATCHED = (
    resources.JOBS,
    resources.PODS,
    resources.SERVICES,
    resources.NETWORK_POLICIES,
    resources.CLAIMS,
    resources.RUNS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DisposableControlPlane:
    """A control plane with the CustomResourceDefinition, and a client of it."""

    kubeconfig: Path
    client: Client
    background: BackgroundLoop
    restarted: ExitStack = field(default_factory=ExitStack)

    def create(self, resource: resources.Resource, body: Object) -> None:
        """Create an object."""
        self.background.call(self.client.create(resource, body["metadata"].get("namespace", ""), body))

    def create_run(self, case: CrashCase) -> None:
        """Create the run of a case."""
        self.create(
            resources.RUNS, build_object(names.KIND, RUN, names.API_VERSION, namespace=case.namespace, spec=SPEC)
        )

    def kill(self, program: str, *, seconds: float) -> None:
        """Send SIGKILL to a process and start it again after some seconds."""
        [(pid, command)] = _find_processes(program, self.kubeconfig.parent)
        os.kill(pid, signal.SIGKILL)
        time.sleep(seconds)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.restarted.callback(process.wait)
        self.restarted.callback(process.kill)
        wait_until(lambda: _find_processes(program, self.kubeconfig.parent))

    @contextmanager
    def watch_cases(self, cases: Sequence[CrashCase]) -> Iterator[None]:
        """Create the cases' namespaces, record their objects and run a simulated kubelet for them."""
        for case in cases:
            self.create(NAMESPACES, build_object("Namespace", case.namespace))
        watches = self.background.call(_start_watches(self.client, cases))
        try:
            yield
        finally:
            self.background.call(_stop_watches(watches))


@contextmanager
def open_disposable_control_plane(binaries: Path, folder: Path) -> Iterator[DisposableControlPlane]:
    """Start a control plane with the CustomResourceDefinition, and stop it at the end."""
    with start_control_plane(binaries, folder) as kubeconfig:
        kubectl = [binaries / "kubectl", f"--kubeconfig={kubeconfig}"]
        install_crd(kubectl)
        background, client = BackgroundLoop(), Client(load_credentials(str(kubeconfig)))
        plane = DisposableControlPlane(kubeconfig=kubeconfig, client=client, background=background)
        background.call(client.__aenter__())
        try:
            with plane.restarted:
                yield plane
        finally:
            background.call(client.__aexit__())
            background.close()


def describe_problems(case: CrashCase, wanted: CrashCase) -> str:
    """Compare the end of a case with the undisturbed one; return an empty string if they agree.

    Pods may be created twice: the Job controller loses answers, too.
    """
    differences = find_differences(strip_times(case.run["status"]), strip_times(wanted.run["status"]))
    duplicates = [name for name in case.created - count_expected_objects() if not name.startswith("pods/")]
    missing = count_expected_objects() - case.created
    return "; ".join([*differences, *(f"{name} too often" for name in duplicates), *(f"no {name}" for name in missing)])


class _RetryingKubelet(SimulatedKubelet):
    """A kubelet that repeats its status updates until they succeed."""

    async def _patch(self, *args: Any, **options: Any) -> None:
        while True:
            try:
                await super()._patch(*args, **options)
                return
            except ApiError:
                await asyncio.sleep(0.2)


class _RetryingRecorder(ObjectRecorder):
    """A recorder that lists again when its version has expired."""

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
                        await self._record(resource, type_, raw)
            except Gone:
                version = ""
            except ApiError:
                await asyncio.sleep(0.1)

    async def _read(self, resource: resources.Resource) -> str:
        version = ""
        async for items, version in self._client.list_pages(resource, selector=_selector(resource)):  # noqa: B007
            for item in items:
                await self._record(resource, "ADDED", item)
        return version


def _selector(resource: resources.Resource) -> str:
    return "" if resource is resources.RUNS else names.MANAGED_SELECTOR


async def _start_watches(client: Client, cases: Sequence[CrashCase]) -> list[asyncio.Future[None]]:
    recorder = _RetryingRecorder(client, cases, _RetryingKubelet(client))
    return [asyncio.ensure_future(recorder.follow(resource)) for resource in WATCHED]


async def _stop_watches(watches: Sequence[asyncio.Future[None]]) -> None:
    for watch in watches:
        watch.cancel()
    for watch in watches:
        with suppress(asyncio.CancelledError):
            await watch


def _find_processes(program: str, folder: Path) -> list[tuple[int, list[str]]]:
    """Return PID and command line of a program's processes that use a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            command = path.read_text().split("\0")[:-1]
            if command and command[0].endswith(f"/{program}") and any(f"={folder}/" in word for word in command):
                found.append((int(path.parent.name), command))
    return found
