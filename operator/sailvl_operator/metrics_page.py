"""Renders /metrics in a thread, so that a large page delays neither reconciles nor the renewal of the Lease.

Scrapes at the same time share one rendering, and a page is served again for a while: anyone who reaches the port may
ask for it at any rate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

MIN_REUSE_SECONDS = 1.0
"""A page is served again for at least this long."""
_REUSE_FACTOR = 9
"""A page is served again this many times longer than its rendering took: at most a tenth of the time is spent on it."""


class MetricsPage:
    """The newest page of a registry.

    `take_snapshot` is called in the event loop before each rendering; the collectors then read only what it stored.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        take_snapshot: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._take_snapshot = take_snapshot
        self._monotonic = monotonic
        self._page = b""
        self._reuse_until = float("-inf")
        self._rendering: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def read(self, names: Sequence[str] = ()) -> bytes:
        """Return all series as text, or those of some metrics."""
        if names:
            async with self._lock:
                self._take_snapshot()
                return await asyncio.to_thread(generate_latest, self._registry.restricted_registry(names))
        if self._rendering is None and self._monotonic() >= self._reuse_until:
            self._rendering = asyncio.create_task(self._render())
        if self._rendering is not None:
            await asyncio.shield(self._rendering)
        return self._page

    async def _render(self) -> None:
        try:
            async with self._lock:
                began = self._monotonic()
                self._take_snapshot()
                self._page = await asyncio.to_thread(generate_latest, self._registry)
                ended = self._monotonic()
                self._reuse_until = ended + max(MIN_REUSE_SECONDS, _REUSE_FACTOR * (ended - began))
        finally:
            self._rendering = None
