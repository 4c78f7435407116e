"""The operator dies before and after each of its API writes in a whole run: same end, no child made twice."""

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
from tests.support.live.control_plane import control_plane
from tests.support.live.crash_points import (
    PATIENCE,
    RUN,
    SPEC,
    Case,
    Kubelet,
    Point,
    Witness,
    expected_children,
    find_differences,
    live_through,
    normalise,
)

pytestmark = pytest.mark.cluster

NAMESPACES = Resource(api_version="v1", plural="namespaces")
AT_ONCE = 64
CRD = f"{names.PLURAL}.{names.GROUP}"
ROOT = Path(__file__).parents[2]
WATCHED = (resources.JOBS, resources.PODS, resources.SERVICES, resources.CLAIMS)


@pytest.fixture
def credentials(tmp_path: Path) -> Iterator[Credentials]:
    """Of a control plane of the test's own, with our resource."""
    built = subprocess.run([ROOT / "hack/cluster/build.sh"], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"no control plane: {built.stderr.strip()[-200:]}")
    binaries = Path(built.stdout.strip())
    with control_plane(binaries, tmp_path) as kubeconfig:
        kubectl = [binaries / "kubectl", f"--kubeconfig={kubeconfig}"]
        subprocess.run([*kubectl, "apply", "--server-side", "-f", ROOT / "crds/sailvlruns.yaml"], check=True)
        subprocess.run([*kubectl, "wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=30s"], check=True)
        yield load_credentials(str(kubeconfig))


@asynccontextmanager
async def watching(client: Client, cases: Sequence[Case]) -> AsyncIterator[None]:
    """The cases' namespaces exist, and are watched."""
    witness = Witness(client, cases, Kubelet(client))
    parts = [witness.watch(kind, names.MANAGED_SELECTOR) for kind in WATCHED]
    tasks = [asyncio.ensure_future(part) for part in [*parts, witness.watch(resources.RUNS, "")]]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def go_through(case: Case, client: Client, credentials: Credentials, turns: asyncio.Semaphore) -> None:
    """One case, from its namespace to its end."""
    async with turns:
        metadata = {"name": case.namespace}
        await client.create(NAMESPACES, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        run = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": RUN}, "spec": SPEC}
        await client.create(resources.RUNS, case.namespace, run)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await live_through(case, credentials)


async def run_cases(points: Sequence[Point | None], credentials: Credentials) -> list[Case]:
    """All at once, or nearly."""
    cases = [Case(namespace=f"crash-{uuid.uuid4().hex[:8]}", point=point) for point in points]
    turns = asyncio.Semaphore(AT_ONCE)
    async with Client(credentials) as client, watching(client, cases):
        await asyncio.gather(*(go_through(case, client, credentials, turns) for case in cases))
    return cases


def judge(case: Case, wanted: Case) -> str:
    """What is wrong with a case; empty: nothing."""
    if not case.ended.is_set():
        return f"not at its end: {case.run.get('status')}"
    differences = find_differences(normalise(case.run["status"]), normalise(wanted.run["status"]))
    if differences:
        return f"another end: {'; '.join(differences)}"
    doubled = case.made - expected_children()
    missing = expected_children() - case.made
    return f"made too often: {doubled}, never: {missing}" if doubled or missing else ""


def all_points(undisturbed: Case) -> list[Point]:
    """Before and after each write and each event, once and twice."""
    counts = ((False, len(undisturbed.writes)), (True, len(undisturbed.events)))
    return [
        Point(is_event=is_event, number=number, is_before=is_before, times=times)
        for is_event, count in counts
        for number in range(1, count + 1)
        for is_before in (True, False)
        for times in (1, 2)
    ]


def build_table(cases: Sequence[Case], undisturbed: Case) -> str:
    """A row a write: what it was in the undisturbed run, and what became of the runs that died there."""
    rows = ["", f"{'':9} {'before':>10} {'after':>10}   write, once and twice"]
    for is_event, writes in ((False, undisturbed.writes), (True, undisturbed.events)):
        for number, words in enumerate(writes, 1):
            here = [c for c in cases if c.point and (c.point.is_event, c.point.number) == (is_event, number)]
            cells = [
                " ".join(_word(c, undisturbed) for c in here if c.point and c.point.is_before == is_before)
                for is_before in (True, False)
            ]
            rows.append(f"{'event' if is_event else 'write'} {number:3} {cells[0]:>10} {cells[1]:>10}   {words}")
    return "\n".join(rows) + "\n"


def _word(case: Case, undisturbed: Case) -> str:
    return "WRONG" if judge(case, undisturbed) else "same" if case.deaths else "-"


async def test_the_end_is_the_same_wherever_the_operator_dies(credentials, capsys):
    [undisturbed] = await run_cases([None], credentials)
    assert judge(undisturbed, undisturbed) == ""
    started = time.monotonic()
    cases = await run_cases(all_points(undisturbed), credentials)
    with capsys.disabled():
        sys.stdout.write(build_table(cases, undisturbed))
        alive = sum(not case.deaths for case in cases)
        sys.stdout.write(f"{len(cases)} runs in {time.monotonic() - started:.0f} s, {alive} not come to their point\n")
    wrong = [f"{case.point}: {judge(case, undisturbed)}" for case in cases if judge(case, undisturbed)]
    assert not wrong, "\n".join(wrong)
