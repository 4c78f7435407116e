"""Watch of runs by kopf: feeds events into the store and the work queue. Built by `app.py`.

Only `on.event` is used: no finalizers, annotations, timers or indices, so kopf itself never writes to a run.

kopf works through an HTTP session of ours (`cluster/kopf_session.py`), which bounds what kopf holds and turns errors
that would end kopf into others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import kopf

from sailvl_operator.api import names
from sailvl_operator.cluster.background import CountError, contain_errors
from sailvl_operator.cluster.client import WATCH_SILENCE_SECONDS, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.kopf_session import LIST_CHUNK_SIZE, IsKnown, build_session, decode_run
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.cluster.workqueue import WorkQueue

OnEvent = Callable[[str | None, dict[str, Any]], None]
"""Called with the type of a watch event (None: the object comes from a list) and the object, of the type SailVLRun."""

_IDLE_SECONDS = 0.1
"""How long kopf holds the last event of a run after it was handled."""


def handle_run_event(type_: str | None, raw: dict[str, Any], runs: RunStore, queue: WorkQueue[RunKey]) -> None:
    """Store the state of a run if it is newer than the stored one, and queue its key if anything changed.

    `type_`: type of the watch event; None for an object from a list.
    """
    metadata = raw["metadata"]
    key = metadata["namespace"], metadata["name"]
    if type_ == "DELETED":
        runs.delete(key, metadata["uid"])
        queue.add(key)
    elif runs.put(raw):
        queue.add(key)


def build_registry(
    on_event: OnEvent,
    credentials: Credentials,
    *,
    is_known: IsKnown,
    on_stop: Callable[[], None],
    count_error: CountError,
) -> kopf.OperatorRegistry:
    """Build a registry with kopf's handlers and settings.

    Events whose resourceVersion is already stored (`is_known`) are filtered out. `on_stop` is called as soon as this
    process is asked to terminate. `count_error` is called for each event that can't be handled.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.scanning.disabled = True
        settings.peering.standalone = True
        settings.watching.server_timeout = ClientConfig().watch_timeout_seconds
        settings.watching.connect_timeout = 10
        settings.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
        settings.watching.chunk_size = LIST_CHUNK_SIZE
        settings.queueing.idle_timeout = _IDLE_SECONDS
        settings.networking.request_timeout = ClientConfig().request_timeout_seconds
        settings.networking.error_backoffs = EndlessBackoff()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        on_stop()  # kopf waits up to 5 s for all tasks of the event loop, ours included

    @kopf.on.login(registry=registry)
    async def connect(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=credentials.server, aiohttp_session=build_session(credentials, is_known))

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def on_run_event(event: kopf.RawEvent, **_: Any) -> None:
        with contain_errors("runs", count_error, subject="an event of a run"):
            on_event(event["type"], decode_run(event["object"]))

    return registry


class NoDiffBase(kopf.DiffBaseStorage):
    """Stores no last-handled configuration. kopf would copy every object to compute diffs that we don't use."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


class EndlessBackoff(Iterable[float]):
    """Seconds between the tries of kopf's requests. kopf gives up after the last one, but an outage may last for
    hours."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.2, 0.5, 1.0, 2.0), repeat(5.0))
