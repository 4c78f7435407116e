"""Kubernetes events on runs: handed over by the engine after the status write, posted by one task, never waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.wire import Nothing
from sailvl_operator.errors import ApiError

log = logging.getLogger(__name__)

_BACKLOG = 10_000
_PAUSE, _RUSH_PAUSE = 0.01, 0.04
"""Seconds between two events: they may wait, other writes may not."""
_REMEMBERED = 4096
_MESSAGE_LIMIT = 1024


class Recorder:
    """Best effort: an event that can't be written is counted and dropped; the same one isn't written twice."""

    def __init__(
        self,
        client: Client,
        *,
        identity: str,
        enabled: bool,
        count: Callable[[str], None],
        clock: Callable[[], float],
        has_backpressure: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._identity = identity
        self._enabled = enabled
        self._count = count
        self._clock = clock
        self._has_backpressure = has_backpressure
        self._backlog: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_BACKLOG)
        self._said: dict[tuple[str, str, str, str], None] = {}

    def record(self, run: Run, *, type_: str, reason: str, message: str) -> None:
        """Queue an event on a run."""
        what = (run.uid, run.resource_version, reason, message)
        if not self._enabled or what in self._said:
            return
        self._said[what] = None
        if len(self._said) > _REMEMBERED:
            del self._said[next(iter(self._said))]
        try:
            self._backlog.put_nowait(
                build_event(
                    run, type_=type_, reason=reason, message=message, identity=self._identity, now=self._clock()
                )
            )
        except asyncio.QueueFull:
            self._count("dropped")

    async def run(self) -> None:
        """Post what is queued, until cancelled."""
        while True:
            event = await self._backlog.get()
            try:
                await self._client.create(resources.EVENTS, event["metadata"]["namespace"], event, shape=Nothing)
                self._count("written")
            except ApiError as error:
                self._count("failed")
                log.warning("an event could not be written: %s", error)
            await asyncio.sleep(_RUSH_PAUSE if self._has_backpressure() else _PAUSE)


def build_event(run: Run, *, type_: str, reason: str, message: str, identity: str, now: float) -> dict[str, Any]:
    """A core/v1 Event about a run."""
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
        "message": message[:_MESSAGE_LIMIT],
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": identity,
    }
