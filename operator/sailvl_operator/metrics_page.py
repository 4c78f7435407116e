"""Renders pages of metrics in a thread, so that a large one delays neither reconciles nor the renewal of the Lease.

Scrapes at the same time share one rendering, and a page is served again for a while: anyone who reaches the port may
ask for it at any rate. Names of metrics in a query are ignored, since each choice of them would be another rendering.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

MIN_REUSE_SECONDS = 1.0
"""A page with the series of the runs is served again for at least this long."""
MIN_OPERATOR_REUSE_SECONDS = 0.1
"""A page of the operator's own metrics, which is small, is served again for at least this long."""
_REUSE_FACTOR = 9
"""A page is served again this many times longer than its rendering took: at most a tenth of the time is spent on it."""


class MetricsPage:
    """The newest page of all series of some registries, which have no metric in common.

    `take_snapshot` is called in the event loop before each rendering; the collectors then read only what it stored.
    `min_reuse_seconds`: a page is served again for at least this long.
    """

    def __init__(
        self,
        *registries: CollectorRegistry,
        take_snapshot: Callable[[], None],
        min_reuse_seconds: float = MIN_REUSE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registries = registries
        self._min_reuse_seconds = min_reuse_seconds
        self._take_snapshot = take_snapshot
        self._monotonic = monotonic
        self._page = b""
        self._reuse_until = float("-inf")
        self._rendering: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        """Return all series as text."""
        if self._rendering is None and self._monotonic() >= self._reuse_until:
            self._rendering = asyncio.create_task(self._render())
        if self._rendering is not None:
            await asyncio.shield(self._rendering)
        return self._page

    async def _render(self) -> None:
        try:
            began = self._monotonic()
            self._take_snapshot()
            self._page = await asyncio.to_thread(self._generate)
            ended = self._monotonic()
            self._reuse_until = ended + max(self._min_reuse_seconds, _REUSE_FACTOR * (ended - began))
        finally:
            self._rendering = None

    def _generate(self) -> bytes:
        return b"".join(map(generate_latest, self._registries))
