"""Recorder of Kubernetes Events on runs. The controller queues them after the status write; one task posts them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import clean_line
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.fair_queue import FairQueue
from sailvl_operator.cluster.resources import Ignored
from sailvl_operator.errors import ApiError

log = logging.getLogger(__name__)

_QUEUE_LIMIT = 10_000
"""Events that may wait. If there are more, the namespace with the most of them loses its newest."""
_PAUSE_SECONDS = 0.01
"""Pause between two Events, so that they do not delay other writes."""
_BACKPRESSURE_PAUSE_SECONDS = 0.04
_RECENT_LIMIT = 4096
_MESSAGE_LIMIT = 1024
"""Maximum length of a message, as the API server enforces it."""


class Recorder:
    """Posts Events on a best-effort basis: one that can't be written is counted and dropped. Duplicates are skipped.
    Namespaces take turns.

    `count`: called with the outcome of each Event (written, failed, dropped). `count_error`: called for each that fails
    unexpectedly.
    """

    def __init__(
        self,
        client: Client,
        *,
        identity: str,
        enabled: bool,
        count: Callable[[str], None],
        clock: Callable[[], float],
        has_backpressure: Callable[[], bool] = lambda: False,
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._identity = identity
        self._enabled = enabled
        self._count = count
        self._clock = clock
        self._has_backpressure = has_backpressure
        self._count_error = count_error
        self._queue: FairQueue[tuple[str, int], dict[str, Any]] = FairQueue(lambda key: key[0])
        self._number = 0
        self._has_events = asyncio.Event()
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
        self._queue.add((run.namespace, self._number), event)
        self._has_events.set()
        if len(self._queue) > _QUEUE_LIMIT:
            self._queue.drop_newest_of_largest_group()
            self._count("dropped")

    async def _take(self) -> dict[str, Any]:
        while not self._queue:
            self._has_events.clear()
            await self._has_events.wait()
        return self._queue.pop()[1]

    async def run(self) -> None:
        """Post queued Events until cancelled."""
        while True:
            event = await self._take()
            with contain_errors("recorder", self._count_error, subject="an Event"):
                await self._post(event)
            await asyncio.sleep(_BACKPRESSURE_PAUSE_SECONDS if self._has_backpressure() else _PAUSE_SECONDS)

    async def _post(self, event: dict[str, Any]) -> None:
        try:
            await self._client.create(resources.EVENTS, event["metadata"]["namespace"], event, decode_as=Ignored)
            self._count("written")
        except ApiError as error:
            self._count("failed")
            log.warning("Event not written: %s", error)


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
