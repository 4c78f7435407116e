"""The Jobs, pods and Services of all runs, kept by informers; the engine's view of what exists."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sailvl_operator.cluster import resources, wire
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.informer import Informer, Key, Kind, Record, Store, mark_gone
from sailvl_operator.core.observe import (
    JobRecord,
    PodRecord,
    ServiceRecord,
    is_calm_job,
    is_calm_pod,
    parse_job,
    parse_pod,
    parse_service,
    stamp_pod,
)

_JOBS: Kind[JobRecord] = Kind(
    resource=resources.JOBS, shape=wire.Job, parse=parse_job, mark_gone=mark_gone, is_calm=is_calm_job
)
_SERVICES: Kind[ServiceRecord] = Kind(
    resource=resources.SERVICES, shape=wire.Service, parse=parse_service, is_calm=lambda _: True
)
_PODS: Kind[PodRecord] = Kind(
    resource=resources.PODS,
    shape=wire.Pod,
    parse=parse_pod,
    mark_gone=mark_gone,
    stamp=stamp_pod,
    is_calm=is_calm_pod,
)


class Children:
    """Stores of each kind, and the tasks that fill them."""

    def __init__(
        self,
        client: Client,
        *,
        namespaces: Sequence[str],
        on_change: Callable[[Key], None],
        count_restart: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        on_calm: Callable[[Key], None] | None = None,
    ) -> None:
        """`on_calm` hears in the place of `on_change` of what nothing has to be done about."""
        self.jobs: Store[JobRecord] = Store(_JOBS, on_change, clock, on_calm=on_calm)
        self.pods: Store[PodRecord] = Store(_PODS, on_change, clock, on_calm=on_calm)
        self.services: Store[ServiceRecord] = Store(_SERVICES, on_change, clock, on_calm=on_calm)

        def watch(kind: Kind[Record], store: Store[Record]) -> list[Informer[Any]]:
            scopes = namespaces or ("",)
            return [Informer(client, kind, store, namespace=scope, count_restart=count_restart) for scope in scopes]

        self._informers = watch(_JOBS, self.jobs) + watch(_PODS, self.pods) + watch(_SERVICES, self.services)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers:
                group.create_task(informer.run(), name=f"informer-{informer.resource}")

    def keep_evidence(self) -> None:
        """From now on: somebody decides by it, and forgets it then. A standby would only collect it."""
        self.jobs.keeps_gone = self.pods.keeps_gone = True

    async def wait_synced(self) -> None:
        """Until every informer has its first list: before that a missing Job means nothing."""
        for informer in self._informers:
            await informer.synced.wait()

    def is_synced(self) -> bool:
        """Whether every informer has its first list."""
        return all(informer.synced.is_set() for informer in self._informers)

    def ages(self) -> Iterator[tuple[str, float]]:
        """Seconds since each kind's watch last said anything; the oldest where there are several."""
        oldest: dict[str, float] = {}
        for informer in self._informers:
            oldest[informer.resource] = max(informer.age(), oldest.get(informer.resource, 0.0))
        yield from oldest.items()
