"""The measurements, one function each. Times are seconds of the benchmark's monotonic clock."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.operator.control_plane import ControlPlane
from bench.operator.peers import SETTLE_SECONDS, NaiveKopf, SailVL, until
from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.types import Defaults
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.core.desired import manifests as desired
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.observe import observe
from sailvl_operator.core.reconcile import reconcile

NAMESPACE = "default"
QUIET_SECONDS = 60.0
_CONNECTIONS = 48
_PAUSE = 0.25
"""Seconds between two counts of objects."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Time and CPU used until all pods of runs that were created at once existed."""

    jobs_s: float
    """Seconds from the first creation until every Job existed."""
    pods_s: float
    """Seconds from the first creation until every pod existed."""
    cpu_s: float
    """CPU seconds of the operator until it was idle again."""
    events: int
    """New runs and changes of Jobs and pods, which the operator must handle. Status changes are not counted: the
    operator causes them itself, and writing more of them must not make an event look cheaper."""
    statuses: int
    """Number of changes of runs after their creation."""
    parts: dict[str, float]
    """CPU seconds by component of the control plane until every pod existed."""


async def start_runs(plane: ControlPlane, operator: SailVL | NaiveKopf, *, runs: int, nodes: int, log: Log) -> Start:
    """Create runs of one stage with `nodes` pods each at once, and measure until the operator is idle again."""
    seen = await asyncio.to_thread(plane.count_changes)
    cpu, parts, began = operator.cpu_seconds(), plane.cpu_seconds(), time.monotonic()
    creating = asyncio.create_task(create_runs(plane, runs, nodes))
    jobs_s = await _await_count(plane, resources.JOBS, runs, began)
    runs_s = await creating - began
    log(f"{runs} runs after {runs_s:.1f} s, their Jobs after {jobs_s:.1f} s")
    pods_s = await _await_count(plane, resources.PODS, runs * nodes, began)
    log(f"{runs * nodes} pods after {pods_s:.1f} s")
    used = {name: seconds - parts.get(name, 0.0) for name, seconds in plane.cpu_seconds().items()}
    await _await_quiet(operator)
    seen = await asyncio.to_thread(plane.count_changes) - seen
    return Start(
        jobs_s=jobs_s,
        pods_s=pods_s,
        cpu_s=operator.cpu_seconds() - cpu,
        events=runs + seen["jobs"] + seen["pods"],
        statuses=seen["sailvlruns"] - runs,
        parts=used,
    )


async def start_bare(plane: ControlPlane, *, runs: int, nodes: int, log: Log) -> float:
    """Create the runs and our operator's Jobs without any operator. Return the seconds until all pods exist."""
    jobs = [build_job(f"run-{n:04}", nodes) for n in range(runs)]
    began = time.monotonic()
    _, done = await asyncio.gather(create_runs(plane, runs, nodes), _create_all(plane, resources.JOBS, jobs))
    jobs_s = done - began
    pods_s = await _await_count(plane, resources.PODS, runs * nodes, began)
    log(f"control plane alone: {runs} Jobs after {jobs_s:.1f} s, {runs * nodes} pods after {pods_s:.1f} s")
    return pods_s


async def create_runs(plane: ControlPlane, runs: int, nodes: int) -> float:
    """Create runs at once, and return the time at which the last one existed."""
    return await _create_all(plane, resources.RUNS, [build_run(f"run-{n:04}", nodes) for n in range(runs)])


async def _create_all(plane: ControlPlane, resource: Resource, bodies: Sequence[dict[str, Any]]) -> float:
    """Create objects over many connections, and return the monotonic time at which the last one existed."""
    many = asyncio.Semaphore(_CONNECTIONS)

    async def create(body: dict[str, Any]) -> None:
        async with many:
            await plane.client.create(resource, NAMESPACE, body)

    await asyncio.gather(*map(create, bodies))
    return time.monotonic()


def build_run(name: str, nodes: int) -> dict[str, Any]:
    """Build a run with one stage and no GPUs."""
    training = {"data": [{"path": "/data/sft"}], "epochs": "1"}
    spec = {
        "image": "registry.example.com/sailvl-trainer:0.1.0",
        "storage": {"volumeClaim": "sail-data"},
        "model": {"preset": "tiny"},
        "workers": {"nodes": nodes, "gpusPerNode": 0},
        "stages": [{"name": "instruction", "sft": training}],
    }
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


def build_job(run: str, nodes: int) -> dict[str, Any]:
    """Build the Job that our operator creates for a run, without the owner reference, which needs the run's UID."""
    metadata = {"namespace": NAMESPACE, "uid": run, "resourceVersion": "1", "generation": 1}
    raw = build_run(run, nodes)
    entry = parse_run(raw | {"metadata": raw["metadata"] | metadata})
    [attempt] = reconcile(entry, observe(), now=time.time(), defaults=Defaults()).start
    job = desired.build_job(attempt, build_appdef(attempt, rendezvous_secret="0" * 32))
    del job["metadata"]["ownerReferences"]
    return job


async def measure_quiet(operator: SailVL, log: Log) -> tuple[int, float]:
    """Return the writes and the CPU cores used in a minute without changes."""
    log(f"{QUIET_SECONDS:.0f} s without changes")
    writes, cpu, began = operator.writes(), operator.cpu_seconds(), time.monotonic()
    await asyncio.sleep(QUIET_SECONDS)
    wall, cpu = time.monotonic() - began, operator.cpu_seconds() - cpu
    return operator.writes() - writes, cpu / wall


async def measure_replacements(
    plane: ControlPlane, *, failures: int, rate: float, attempt: int, log: Log
) -> list[float]:
    """Let one pod of each of `failures` runs fail, at `rate` per second (`inf`: at once).

    Return the sorted seconds from the write of the failure until the Job of the next attempt exists, without the
    settling time.
    """
    log(f"{failures} pods fail, {rate:.0f} per second")
    failed: dict[str, float] = {}
    made: dict[str, float] = {}
    watching = asyncio.create_task(_watch_jobs(plane, attempt + 1, made))
    await asyncio.sleep(1)
    victims = await _choose_pods(plane, failures, attempt)
    began = time.monotonic()

    async def fail(number: int, pod: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        metadata = pod["metadata"]
        await plane.client.patch(
            resources.PODS, NAMESPACE, metadata["name"], {"status": _LOST_PEER}, subresource="status"
        )
        failed[metadata["labels"][names.LABEL_RUN]] = time.monotonic()

    await asyncio.gather(*(fail(number, pod) for number, pod in enumerate(victims)))
    async with asyncio.timeout(180):
        while not failed.keys() <= made.keys():
            await asyncio.sleep(0.2)
    watching.cancel()
    return sorted(max(0.0, made[run] - at - SETTLE_SECONDS) for run, at in failed.items())


_LOST_PEER = {
    "phase": "Failed",
    "containerStatuses": [
        {
            "name": names.CONTAINER,
            "image": "",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": {"exitCode": 76, "reason": "Error"}},
        }
    ],
}
"""Status of a worker that reports a lost peer: the operator waits for its peers, and no backoff follows."""


async def measure_restart(plane: ControlPlane, operator: SailVL, *, runs: int, log: Log) -> float:
    """Return the seconds from the start of a process until it has reconciled every run and its queue is empty."""
    await operator.stop()
    log("restarting the operator")
    began = time.monotonic()
    operator.spawn()

    def is_done() -> bool:
        done, depth = operator.reconciled()
        return done >= runs and depth == 0

    await until(is_done, 120, pause=0.1)
    return time.monotonic() - began


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def _list_version(plane: ControlPlane, resource: Resource) -> str:
    version = ""
    async for _, version in plane.client.list_pages(resource, metadata_only=True):  # noqa: B007
        pass
    return version


async def _watch_jobs(plane: ControlPlane, attempt: int, made: dict[str, float]) -> None:
    version = await _list_version(plane, resources.JOBS)
    async for type_, job in plane.client.watch(resources.JOBS, resource_version=version):
        labels = job["metadata"].get("labels", {})
        if type_ == "ADDED" and labels.get(names.LABEL_ATTEMPT) == str(attempt):
            made[labels[names.LABEL_RUN]] = time.monotonic()


async def _choose_pods(plane: ControlPlane, failures: int, attempt: int) -> list[dict[str, Any]]:
    """Choose first workers of runs whose newest attempt is `attempt`; pods of an older one may be terminating."""
    pods = await _list(plane, resources.PODS, f"{names.LABEL_ATTEMPT}={attempt},{names.LABEL_COMPLETION_INDEX}=0")
    newer = await _list(plane, resources.JOBS, f"{names.LABEL_ATTEMPT}={attempt + 1}")
    replaced = {job["metadata"]["labels"][names.LABEL_RUN] for job in newer}
    current = [pod for pod in pods if pod["metadata"]["labels"][names.LABEL_RUN] not in replaced]
    return random.Random(0).sample(current, failures)


async def _list(plane: ControlPlane, resource: Resource, selector: str) -> list[dict[str, Any]]:
    """Return the metadata of all objects that a label selector matches."""
    found: list[dict[str, Any]] = []
    async for items, _ in plane.client.list_pages(resource, NAMESPACE, selector=selector, metadata_only=True):
        found += items
    return found


async def _await_count(plane: ControlPlane, resource: Resource, wanted: int, began: float) -> float:
    async with asyncio.timeout(900):
        while await _count(plane, resource) < wanted:
            await asyncio.sleep(_PAUSE)
    return time.monotonic() - began


async def _count(plane: ControlPlane, resource: Resource) -> int:
    """Count objects by requesting a page of one: the API server returns how many remain."""
    page = await plane.client._send_with_retries("list", "GET", resource.path(NAMESPACE), {"limit": "1"})
    remaining: int = page["metadata"].get("remainingItemCount", 0)
    return len(page["items"] or []) + remaining


async def _await_quiet(operator: SailVL | NaiveKopf) -> None:
    """Wait until the operator has written nothing and used at most 5 % of a core for five seconds."""
    async with asyncio.timeout(300):
        while True:
            cpu, writes = operator.cpu_seconds(), operator.writes()
            await asyncio.sleep(5)
            if operator.cpu_seconds() - cpu < 0.25 and operator.writes() == writes:
                return
