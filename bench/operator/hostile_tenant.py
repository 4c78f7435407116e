"""A hostile tenant: runs whose workers answer hostilely, forged Jobs and pods, the largest objects that the API server
accepts, and churn. Used by `tenants.py`.

Everything lies in one namespace, whose pods have an address of their own on this machine, where one server answers on
the workers' port.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.operator import hostile_objects
from bench.operator.control_plane import HOSTILE_ADDRESS, HOSTILE_NAMESPACE, ControlPlane
from bench.operator.hostile_churn import HostileChurn
from bench.operator.hostile_objects import Manifest, count_bytes
from bench.operator.scenarios import Log, build_run
from bench.operator.worker_servers import HostileWorkers
from sailvl_operator.api import names
from sailvl_operator.api.parse import MAX_SPEC_BYTES
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.errors import ApiError, Conflict

_CONNECTIONS = 4
"""Concurrent creations: with more large objects, the API server would need more memory, and each request more time."""
_WIDE_BYTES = 1_200_000
"""Size of the JSON of a stored wide object, at least."""
_JOB_TIMEOUT_SECONDS = 120.0
_WIDE_JOB_CONTAINERS = 2000
_WIDE_JOB_ATTEMPT = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class HostileScale:
    """Numbers of hostile objects."""

    runs: int
    """Runs of two pods with hostile workers."""
    objects: int
    """Objects of each kind of large ones: runs with large specs, runs with wide metadata, NetworkPolicies, Jobs and
    pods; as many forged Jobs and four times as many forged pods."""

    def count_runs(self) -> int:
        """Return the number of all runs."""
        return self.runs + 2 * self.objects


class HostileTenant:
    """Async context manager: creates the hostile objects, and keeps changing them while its context is open.

    `log`: called with each kind of object that exists.
    """

    def __init__(self, plane: ControlPlane, scale: HostileScale, log: Log) -> None:
        self._plane, self._scale, self._log = plane, scale, log
        self._churning: asyncio.Task[None] | None = None
        self.workers = HostileWorkers(HOSTILE_ADDRESS)
        self.churn: HostileChurn
        self.refusals: list[str] = []
        """Objects that the API server refused, or stored smaller than they have to be, each with the reason."""

    async def __aenter__(self) -> HostileTenant:
        await self.workers.start()
        try:
            await self._attack()
        except BaseException:
            await self.workers.stop()
            raise
        return self

    async def _attack(self) -> None:
        """Create all objects, and start to change them."""
        await self._plane.create_namespace(HOSTILE_NAMESPACE)
        count, run_count = self._scale.objects, self._scale.runs
        runs = await self._create("runs", resources.RUNS, (build_run(f"hostile-{n:04}", 2) for n in range(run_count)))
        large = await self._create("large runs", resources.RUNS, map(hostile_objects.build_large_run, range(count)))
        self._check_specs(large)
        wide = map(hostile_objects.build_wide_run, range(count))
        await self._create("wide runs", resources.RUNS, wide, least_bytes=_WIDE_BYTES)
        targets = await self._find_targets(runs[: 2 * count])
        await self._create_owned(targets)
        self.churn = HostileChurn(self._plane, targets, [run["metadata"]["name"] for run in large])
        self._churning = asyncio.create_task(self.churn.run())

    async def __aexit__(self, *_: object) -> None:
        await self.workers.stop()
        if self._churning is not None:
            self._churning.cancel()
            await asyncio.wait([self._churning])
            if not self._churning.cancelled():
                self._churning.result()

    def count_activity(self) -> Counter[str]:
        """Return the reads of hostile workers, their slow answers, and the writes by kind, so far."""
        return self.churn.writes + Counter({"reads": self.workers.reads, "slow answers": self.workers.slow_answers})

    async def count_started(self) -> int:
        """Return how many hostile runs have the Job of their first attempt."""
        return len(await self._list_first_jobs())

    async def _list_first_jobs(self) -> dict[str, Manifest]:
        """Return the metadata of the Jobs of first attempts, by run. The tenant forges only those of later ones."""
        pages = self._plane.client.list_pages(
            resources.JOBS, HOSTILE_NAMESPACE, selector=f"{names.LABEL_ATTEMPT}=1", metadata_only=True
        )
        return {job["metadata"]["labels"][names.LABEL_RUN]: job async for jobs, _ in pages for job in jobs}

    async def _find_targets(self, runs: Sequence[Manifest]) -> list[tuple[Manifest, Manifest]]:
        """Wait until the operator has started runs, but not forever, and return those that are started with their Jobs.

        Raises RuntimeError if none is.
        """
        end = time.monotonic() + _JOB_TIMEOUT_SECONDS
        while True:
            jobs = await self._list_first_jobs()
            started = [(run, jobs[run["metadata"]["name"]]) for run in runs if run["metadata"]["name"] in jobs]
            if len(started) < len(runs) and time.monotonic() < end:
                await asyncio.sleep(1)
            elif started:
                return started
            else:
                raise RuntimeError("the operator has started no hostile run, so nothing can be forged")

    async def _create_owned(self, targets: Sequence[tuple[Manifest, Manifest]]) -> None:
        """Create the objects that claim to belong to runs: large NetworkPolicies, forged Jobs, and pods of these."""
        count = self._scale.objects
        runs = [targets[n % len(targets)][0] for n in range(count)]

        def forge_jobs(first_attempt: int, containers: int) -> Iterator[Manifest]:
            for n, run in enumerate(runs):
                attempt = first_attempt + n // len(targets) * 2 + n % 2
                yield hostile_objects.build_forged_job(run, attempt, containers=containers)

        policies = (hostile_objects.build_large_policy(n, run) for n, run in enumerate(runs))
        await self._create("NetworkPolicies", resources.NETWORK_POLICIES, policies, least_bytes=_WIDE_BYTES)
        forged = await self._create("forged Jobs", resources.JOBS, forge_jobs(2, 1))
        wide_jobs = forge_jobs(_WIDE_JOB_ATTEMPT, _WIDE_JOB_CONTAINERS)
        await self._create("wide Jobs", resources.JOBS, wide_jobs, least_bytes=_WIDE_BYTES)
        owners = list(zip(runs, forged, strict=False))
        pods = (hostile_objects.build_forged_pod(n, *owners[n % len(owners)]) for n in range(4 * count))
        await self._create("forged pods", resources.PODS, pods)
        wide_pods = (hostile_objects.build_wide_pod(9000 + n, *owner) for n, owner in enumerate(owners))
        await self._create("wide pods", resources.PODS, wide_pods, least_bytes=_WIDE_BYTES)

    async def _create(
        self, kind: str, resource: Resource, manifests: Iterable[Manifest], *, least_bytes: int = 0
    ) -> list[Manifest]:
        """Create objects, and return those that the API server accepted, without the managed fields."""
        slots, created, sizes = asyncio.Semaphore(_CONNECTIONS), [], [0]

        async def create(manifest: Manifest) -> None:
            try:
                stored = await self._plane.client.create(resource, HOSTILE_NAMESPACE, manifest)
            except Conflict:  # the response to the first try was lost
                stored = await self._plane.client.get(resource, HOSTILE_NAMESPACE, manifest["metadata"]["name"])
            except ApiError as error:
                self.refusals.append(f"{kind}: {error}"[:200])
                return
            finally:
                slots.release()
            sizes.append(count_bytes(stored))
            if sizes[-1] < least_bytes:
                self.refusals.append(f"{kind}: stored with {sizes[-1]} bytes, wanted {least_bytes}")
            stored["metadata"].pop("managedFields", None)
            created.append(stored)

        async with asyncio.TaskGroup() as group:
            for manifest in manifests:
                await slots.acquire()
                group.create_task(create(manifest))
        self._log(f"{len(created)} hostile {kind} exist, of up to {max(sizes) / 2**20:.2f} MiB as JSON")
        return sorted(created, key=lambda stored: str(stored["metadata"]["name"]))

    def _check_specs(self, runs: Iterable[Manifest]) -> None:
        """Report runs whose stored spec is not just below the operator's limit."""
        for size in (count_bytes(run["spec"]) for run in runs):
            if not 0.95 * MAX_SPEC_BYTES < size <= MAX_SPEC_BYTES:
                self.refusals.append(f"large runs: spec stored with {size} bytes, wanted almost {MAX_SPEC_BYTES}")
