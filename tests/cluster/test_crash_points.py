"""An operator that crashes around any of its API writes leads to the same result, without duplicate objects."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import Credentials, load_credentials
from sailvl_operator.cluster.resources import Resource
from tests.support.live.cluster import install_crd
from tests.support.live.control_plane import start_control_plane
from tests.support.live.crash_points import (
    RUN,
    RUN_TIMEOUT_SECONDS,
    SPEC,
    CrashCase,
    CrashPoint,
    ObjectRecorder,
    SimulatedKubelet,
    count_expected_objects,
    find_differences,
    reconcile_with_crashes,
    strip_times,
)

pytestmark = pytest.mark.cluster

NAMESPACES = Resource(api_version="v1", plural="namespaces")
MAX_PARALLEL_RUNS = 64
ROOT = Path(__file__).parents[2]
WATCHED = (resources.JOBS, resources.PODS, resources.SERVICES, resources.NETWORK_POLICIES, resources.CLAIMS)


@pytest.fixture
def credentials(tmp_path: Path) -> Iterator[Credentials]:
    """Start a control plane with the CustomResourceDefinition and yield its credentials."""
    built = subprocess.run([ROOT / "hack/cluster/build.sh"], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"no control plane: {built.stderr.strip()[-200:]}")
    binaries = Path(built.stdout.strip())
    with start_control_plane(binaries, tmp_path) as kubeconfig:
        kubectl = [binaries / "kubectl", f"--kubeconfig={kubeconfig}"]
        install_crd(kubectl)
        yield load_credentials(str(kubeconfig))


@asynccontextmanager
async def record_objects(client: Client, cases: Sequence[CrashCase]) -> AsyncIterator[None]:
    """Record the objects of all cases and run a simulated kubelet for them."""
    recorder = ObjectRecorder(client, cases, SimulatedKubelet(client))
    parts = [recorder.watch(kind, names.MANAGED_SELECTOR) for kind in WATCHED]
    tasks = [asyncio.ensure_future(part) for part in [*parts, recorder.watch(resources.RUNS, "")]]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def run_case(case: CrashCase, client: Client, credentials: Credentials, limit: asyncio.Semaphore) -> None:
    """Create the namespace and the run of a case and reconcile it to its end."""
    async with limit:
        metadata = {"name": case.namespace}
        await client.create(NAMESPACES, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        run = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": RUN}, "spec": SPEC}
        await client.create(resources.RUNS, case.namespace, run)
        with suppress(TimeoutError):
            async with asyncio.timeout(RUN_TIMEOUT_SECONDS):
                await reconcile_with_crashes(case, credentials)


async def run_cases(points: Sequence[CrashPoint | None], credentials: Credentials) -> list[CrashCase]:
    """Run a case for each crash point, in parallel."""
    cases = [CrashCase(namespace=f"crash-{uuid.uuid4().hex[:8]}", point=point) for point in points]
    limit = asyncio.Semaphore(MAX_PARALLEL_RUNS)
    async with Client(credentials) as client, record_objects(client, cases):
        await asyncio.gather(*(run_case(case, client, credentials, limit) for case in cases))
    return cases


def describe_problems(case: CrashCase, wanted: CrashCase) -> str:
    """Compare the end of a case with the undisturbed one; return an empty string if they agree."""
    if not case.has_finished.is_set():
        return f"not finished: {case.run.get('status')}"
    differences = find_differences(strip_times(case.run["status"]), strip_times(wanted.run["status"]))
    if differences:
        return f"different status: {'; '.join(differences)}"
    duplicates = case.created - count_expected_objects()
    missing = count_expected_objects() - case.created
    return f"created too often: {duplicates}, never: {missing}" if duplicates or missing else ""


def list_crash_points(undisturbed: CrashCase) -> list[CrashPoint]:
    """Return crash points before and after each write and each event, once and twice."""
    counts = ((False, len(undisturbed.writes)), (True, len(undisturbed.events)))
    return [
        CrashPoint(is_event=is_event, number=number, is_before=is_before, times=times)
        for is_event, count in counts
        for number in range(1, count + 1)
        for is_before in (True, False)
        for times in (1, 2)
    ]


def build_table(cases: Sequence[CrashCase], undisturbed: CrashCase) -> str:
    """Return a table with a row per write: the write, and the results of the runs that crashed there."""
    rows = ["", f"{'':9} {'before':>10} {'after':>10}   write, once and twice"]
    for is_event, writes in ((False, undisturbed.writes), (True, undisturbed.events)):
        for number, write in enumerate(writes, 1):
            crashed = [c for c in cases if c.point and (c.point.is_event, c.point.number) == (is_event, number)]
            cells = [
                " ".join(
                    _describe_result(c, undisturbed) for c in crashed if c.point and c.point.is_before == is_before
                )
                for is_before in (True, False)
            ]
            rows.append(f"{'event' if is_event else 'write'} {number:3} {cells[0]:>10} {cells[1]:>10}   {write}")
    return "\n".join(rows) + "\n"


def _describe_result(case: CrashCase, undisturbed: CrashCase) -> str:
    return "WRONG" if describe_problems(case, undisturbed) else "same" if case.crashes else "-"


async def test_crash_at_any_write_changes_no_result(credentials, capsys):
    [undisturbed] = await run_cases([None], credentials)
    assert describe_problems(undisturbed, undisturbed) == ""
    started = time.monotonic()
    cases = await run_cases(list_crash_points(undisturbed), credentials)
    with capsys.disabled():
        sys.stdout.write(build_table(cases, undisturbed))
        uncrashed = sum(not case.crashes for case in cases)
        sys.stdout.write(
            f"{len(cases)} runs in {time.monotonic() - started:.0f} s, {uncrashed} did not reach their crash point\n"
        )
    problems = [
        f"{case.point}: {describe_problems(case, undisturbed)}"
        for case in cases
        if describe_problems(case, undisturbed)
    ]
    assert not problems, "\n".join(problems)
