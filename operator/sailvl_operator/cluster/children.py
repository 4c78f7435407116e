"""The Jobs and pods of all runs, kept by informers; the engine's view of what exists."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.informer import Informer, Key, Kind, Store, mark_pod_gone
from sailvl_operator.core.observe import JobRecord, PodRecord, parse_job, parse_pod, stamp_pod

_JOBS: Kind[JobRecord] = Kind(resource=resources.JOBS, parse=parse_job)
_PODS: Kind[PodRecord] = Kind(resource=resources.PODS, parse=parse_pod, mark_gone=mark_pod_gone, stamp=stamp_pod)


class Children:
    """Stores of both kinds, and the tasks that fill them."""

    def __init__(
        self,
        client: Client,
        *,
        namespaces: Sequence[str],
        on_change: Callable[[Key], None],
        count_restart: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.jobs: Store[JobRecord] = Store(_JOBS, on_change, clock)
        self.pods: Store[PodRecord] = Store(_PODS, on_change, clock)
        scopes = namespaces or ("",)
        self._jobs = [
            Informer(client, _JOBS, self.jobs, namespace=scope, count_restart=count_restart) for scope in scopes
        ]
        self._pods = [
            Informer(client, _PODS, self.pods, namespace=scope, count_restart=count_restart) for scope in scopes
        ]
        self._informers: list[Informer[JobRecord] | Informer[PodRecord]] = [*self._jobs, *self._pods]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers:
                group.create_task(informer.run(), name=f"informer-{informer.resource}")

    async def wait_synced(self) -> None:
        """Until every informer has its first list: before that a missing Job means nothing."""
        for informer in self._informers:
            await informer.synced.wait()

    def is_synced(self) -> bool:
        """Whether every informer has its first list."""
        return all(informer.synced.is_set() for informer in self._informers)

    def ages(self) -> Iterator[tuple[str, float]]:
        """Seconds since each kind's watch last said anything; the oldest where there are several."""
        yield resources.JOBS.plural, max(informer.age() for informer in self._jobs)
        yield resources.PODS.plural, max(informer.age() for informer in self._pods)
