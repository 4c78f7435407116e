"""The kopf edge: events of runs in, nothing decided, nothing written. `cli/operator.py` builds it and runs kopf.

Only `on.event` is used: no finalizers, no annotations, no timers, no indices, so kopf itself never patches a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import kopf

from sailvl_operator.api import names
from sailvl_operator.cluster.client import WATCH_SILENCE_SECONDS
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.kopf_session import IsKnown, build_session

OnEvent = Callable[[str | None, dict[str, Any]], None]
"""Called with the watch event's type (None: listed) and the whole object."""


def build_registry(
    sink: OnEvent, credentials: Credentials, *, is_known: IsKnown, watch_timeout: int, on_stop: Callable[[], None]
) -> kopf.OperatorRegistry:
    """kopf's handlers, in a registry of their own; `on_stop` is called as soon as this process is told to end. Changes
    of which `is_known` says so aren't told."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.scanning.disabled = True
        settings.peering.standalone = True
        settings.watching.server_timeout = watch_timeout
        settings.watching.connect_timeout = 10
        settings.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
        settings.networking.request_timeout = 30
        settings.networking.error_backoffs = EndlessBackoff()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        on_stop()  # kopf takes every task of the process for its own and would wait for them for 5 s

    @kopf.on.login(registry=registry)
    async def connect(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=credentials.server, aiohttp_session=build_session(credentials, is_known))

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        sink(event["type"], dict(event["object"]))

    return registry


class NoDiffBase(kopf.DiffBaseStorage):
    """kopf copies every object to tell changes of its essence apart; we look at every event, so nothing is copied."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


class EndlessBackoff(Iterable[float]):
    """Seconds between the tries of a request that fails for a passing reason. kopf gives up after the last, and an
    outage may last for hours."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.2, 0.5, 1.0, 2.0), repeat(5.0))
