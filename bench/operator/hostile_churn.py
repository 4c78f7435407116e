"""Writes of a hostile tenant at a fixed rate: forged pods and Jobs appear and disappear, large objects change."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence

from bench.operator import hostile_objects
from bench.operator.control_plane import HOSTILE_NAMESPACE, ControlPlane
from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import MERGE_PATCH
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.errors import ApiError

WRITES_PER_SECOND = 50.0
"""Rate of creations and deletions of forged pods and Jobs."""
LARGE_WRITES_PER_SECOND = 1.0
"""Rate of changes of large objects, of which each takes the API server up to a second."""
_CONCURRENCY = 8
"""Maximum number of concurrent writes of each of the two rates."""
_FIRST_ATTEMPT = 100
"""Attempt of the first forged Job. Those of other Jobs that the tenant forges are smaller."""

SMALL_WRITES = ("create pod", "create Job", "delete pod", "create pod", "delete Job", "delete pod")
"""Kinds of writes at WRITES_PER_SECOND, in turn."""
LARGE_WRITES = ("patch run", "patch run", "patch run", "replace NetworkPolicy")
"""Kinds of writes at LARGE_WRITES_PER_SECOND, in turn."""

Manifest = hostile_objects.Manifest
Write = Callable[[int], Awaitable[None]]


class HostileChurn:
    """Writer of hostile objects.

    `targets`: runs with the real Job of their first attempt; Jobs and pods of these are forged. `large_runs`: names of
    runs that are patched.
    """

    def __init__(
        self, plane: ControlPlane, targets: Sequence[tuple[Manifest, Manifest]], large_runs: Sequence[str]
    ) -> None:
        self._plane, self._targets, self._large_runs = plane, targets, large_runs
        self._kinds: dict[str, Write] = {
            "create pod": self._create_pod,
            "delete pod": self._delete_pod,
            "create Job": self._create_job,
            "delete Job": self._delete_job,
            "patch run": self._patch_run,
            "replace NetworkPolicy": self._replace_policy,
        }
        self._chance = random.Random(0)
        self._pods: deque[Manifest] = deque()
        self._jobs: deque[tuple[Manifest, Manifest]] = deque()
        self.writes: Counter[str] = Counter()
        """Successful writes so far, by kind."""
        self.failures: Counter[str] = Counter()
        """Failed writes so far, by kind and status: of objects that the operator or a controller of Kubernetes changed
        or deleted first, or because the API server is overloaded."""

    async def run(self) -> None:
        """Write until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(SMALL_WRITES, WRITES_PER_SECOND))
            group.create_task(self._repeat(LARGE_WRITES, LARGE_WRITES_PER_SECOND))

    async def _repeat(self, kinds: Sequence[str], rate: float) -> None:
        """Write these kinds in turn, at `rate` per second or as fast as the API server answers."""
        slots, due = asyncio.Semaphore(_CONCURRENCY), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                await slots.acquire()
                writing = group.create_task(self._write(kinds[number % len(kinds)], number))
                writing.add_done_callback(lambda _: slots.release())
                due = max(due + 1 / rate, time.monotonic() - 1.0)  # at most one second is caught up
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _write(self, kind: str, number: int) -> None:
        try:
            await self._kinds[kind](number)
            self.writes[kind] += 1
        except ApiError as error:
            self.failures[f"{kind} {error.status}"] += 1

    async def _create_pod(self, number: int) -> None:
        """Create a pod of a run's real Job, or of a forged Job of a later attempt."""
        is_real = not self._jobs or number % 2 == 0
        run, job = self._chance.choice(self._targets if is_real else self._jobs)
        pod = hostile_objects.build_forged_pod(number, run, job)
        self._pods.append(await self._plane.client.create(resources.PODS, HOSTILE_NAMESPACE, pod))

    async def _create_job(self, number: int) -> None:
        run, _ = self._chance.choice(self._targets)
        job = hostile_objects.build_forged_job(run, _FIRST_ATTEMPT + number % 1000)
        self._jobs.append((run, await self._plane.client.create(resources.JOBS, HOSTILE_NAMESPACE, job)))

    async def _delete_pod(self, _: int) -> None:
        if self._pods:
            await self._delete(resources.PODS, self._pods.popleft())

    async def _delete_job(self, _: int) -> None:
        if self._jobs:
            await self._delete(resources.JOBS, self._jobs.popleft()[1])

    async def _delete(self, resource: Resource, manifest: Manifest) -> None:
        metadata = manifest["metadata"]
        await self._plane.client.delete(resource, HOSTILE_NAMESPACE, metadata["name"], uid=metadata["uid"])

    async def _patch_run(self, number: int) -> None:
        name = self._chance.choice(self._large_runs)
        await self._patch(resources.RUNS, name, {"metadata": {"annotations": {"churn": str(number)}}})

    async def _replace_policy(self, number: int) -> None:
        """Make the NetworkPolicy that the operator has created for a run as large as possible."""
        run, _ = self._chance.choice(self._targets)
        spec = hostile_objects.build_large_policy_spec(number)
        await self._patch(
            resources.NETWORK_POLICIES, names.network_policy_name(run["metadata"]["name"]), {"spec": spec}
        )

    async def _patch(self, resource: Resource, name: str, body: Manifest) -> None:
        """Patch an object without decoding the response, which would delay the measurement in this process."""
        path = resource.path(HOSTILE_NAMESPACE, name)
        await self._plane.client._send_with_retries(
            "patch", "PATCH", path, body=body, content_type=MERGE_PATCH, decode_as=resources.Ignored
        )
