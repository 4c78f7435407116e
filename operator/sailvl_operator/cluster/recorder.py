"""Recorder of Kubernetes Events on runs. The controller queues them after the status write; a few tasks post them.

A namespace whose Events are refused, or answered slowly, delays its own alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import clean_line
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import CountError, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.fair_tasks import FairTasks, Pacer
from sailvl_operator.cluster.resources import Ignored
from sailvl_operator.errors import ApiError

log = logging.getLogger(__name__)

_QUEUE_LIMIT = 10_000
"""Events that may wait. If there are more, the namespace with the most of them loses its oldest."""
_NAMESPACE_QUEUE_LIMIT = 2_000
"""Events of one namespace that may wait."""
_CONCURRENCY = 8
"""Events that are posted at a time, one of each namespace, so that those of a namespace keep their order."""
_POST_TIMEOUT_SECONDS = 10.0
"""Seconds after which an Event is given up, with all its tries."""
_PAUSE_SECONDS = 0.01
"""Seconds between two Events, so that they do not delay other writes."""
_BACKPRESSURE_PAUSE_SECONDS = 0.04
"""Seconds between two Events of namespaces with backpressure."""
_RECENT_LIMIT = 4096
_MESSAGE_LIMIT = 1024
"""Maximum length of a message, as the API server enforces it."""


class Recorder:
    """Posts Events on a best-effort basis: one that can't be written is counted and dropped. Duplicates are skipped.
    Namespaces take turns.

    `count`: called with the outcome of each Event (written, failed, dropped). `has_backpressure`: whether the writes of
    a namespace should wait. `count_error`: called for each Event that fails unexpectedly.
    """

    def __init__(
        self,
        client: Client,
        *,
        identity: str,
        enabled: bool,
        count: Callable[[str], None],
        clock: Callable[[], float],
        has_backpressure: Callable[[str], bool] = lambda _: False,
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._identity = identity
        self._enabled = enabled
        self._count = count
        self._clock = clock
        self._has_backpressure = has_backpressure
        self._tasks: FairTasks[tuple[str, int], dict[str, Any]] = FairTasks(
            "recorder",
            self._post,
            group_by=itemgetter(0),
            limit=_CONCURRENCY,
            group_limit=1,
            queue_limit=_QUEUE_LIMIT,
            group_queue_limit=_NAMESPACE_QUEUE_LIMIT,
            on_drop=lambda: count("dropped"),
            count_error=count_error,
        )
        self._pacer, self._backpressure_pacer = Pacer(), Pacer()
        self._number = 0
        self._recent: dict[tuple[str, str, str, str], None] = {}

    def record(self, run: Run, *, type_: str, reason: str, message: str) -> None:
        """Queue an Event on a run."""
        event_key = (run.uid, run.resource_version, reason, message)
        if not self._enabled or event_key in self._recent:
            return
        self._recent[event_key] = None
        if len(self._recent) > _RECENT_LIMIT:
            del self._recent[next(iter(self._recent))]
        self._number += 1
        event = build_event(
            run, type_=type_, reason=reason, message=message, identity=self._identity, now=self._clock()
        )
        self._tasks.add((run.namespace, self._number), event)

    async def run(self) -> None:
        """Post queued Events until cancelled."""
        await self._tasks.run()

    async def _post(self, key: tuple[str, int], event: dict[str, Any]) -> None:
        namespace = key[0]
        if self._has_backpressure(namespace):
            await self._backpressure_pacer.wait_turn(_BACKPRESSURE_PAUSE_SECONDS)
        await self._pacer.wait_turn(_PAUSE_SECONDS)
        try:
            async with asyncio.timeout(_POST_TIMEOUT_SECONDS):
                await self._client.create(resources.EVENTS, namespace, event, decode_as=Ignored)
            self._count("written")
        except (ApiError, TimeoutError) as error:
            self._count("failed")
            log.warning("Event not written: %s", error or "no answer in time", extra={"namespace": namespace})


def build_event(run: Run, *, type_: str, reason: str, message: str, identity: str, now: float) -> dict[str, Any]:
    """Build a core/v1 Event about a run. `identity`: name of this replica; `now`: Unix seconds."""
    time = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.name}.", "namespace": run.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": run.namespace,
            "name": run.name,
            "uid": run.uid,
            "resourceVersion": run.resource_version,
        },
        "type": type_,
        "reason": reason,
        "message": clean_line(message, _MESSAGE_LIMIT),
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": identity,
    }
