"""HTTP server of the operator: /metrics for Prometheus, /healthz and /readyz for the kubelet, and the rules of both.

/metrics/operator has the metrics of the operator without the series of the runs, for tools that read them often.

kopf's liveness endpoint isn't used, since it returns 200 even if a probe reports a problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sailvl_operator.metrics_page import MetricsPage
from sailvl_operator.settings import HealthSettings

STALE_WATCH_SECONDS = 420.0
"""A watch without data for this long fails liveness; more than the 300 s after which the API server ends a watch."""
STALE_RUNS_SECONDS = 300.0
"""The watch of runs may miss events for this long before liveness fails."""
STALLED_QUEUE_SECONDS = 300.0
"""Keys may wait in the work queue for this long, without a worker taking any, before liveness fails."""

MAX_SCRAPES = 8
"""Requests to /metrics that are answered at a time; a client that reads slowly holds a copy of the page in memory."""
MAX_SCRAPE_SECONDS = 10.0
"""A client must have read the page within this time."""

Check = Callable[[], Sequence[str]]
"""Returns the errors of a probe; none if it passes."""


def liveness_errors(
    *, silent_watches: Iterable[tuple[str, float]], missing_events_seconds: float, stalled_seconds: float
) -> list[str]:
    """Return why the kubelet should restart this process; empty if it is healthy.

    `silent_watches`: each watched resource with the seconds since its last data. `missing_events_seconds`: for how long
    the watch of runs has been missing events. `stalled_seconds`: for how long keys wait and no worker takes any; 0 on a
    standby.
    """
    errors = [
        f"watch of {resource}: no data for {seconds:.0f} s"
        for resource, seconds in silent_watches
        if seconds > STALE_WATCH_SECONDS
    ]
    if missing_events_seconds > STALE_RUNS_SECONDS:
        errors.append(f"watch of runs: missing events for {missing_events_seconds:.0f} s")
    if stalled_seconds > STALLED_QUEUE_SECONDS:
        errors.append(f"work queue: keys wait, but no worker took any for {stalled_seconds:.0f} s")
    return errors


def readiness_errors(*, is_synced: bool, missing_permissions: Iterable[str] = ()) -> list[str]:
    """Return why this process isn't ready. A standby is ready, too, once its informers are synced.

    `missing_permissions`: those without which the runs of some namespace can't be reconciled.
    """
    errors = [] if is_synced else ["informers: first lists not complete"]
    return errors + [f"informers: {permission}" for permission in missing_permissions]


class HealthServer:
    """Serves the endpoints while its context is open.

    `port`: the port that it listens on, once it is open; differs from the settings if they say 0.
    """

    def __init__(
        self,
        settings: HealthSettings,
        page: MetricsPage,
        *,
        operator_page: MetricsPage,
        liveness: Check,
        readiness: Check,
    ) -> None:
        self._settings = settings
        self._pages = {"/metrics": page, "/metrics/operator": operator_page}
        app = web.Application()
        for path in self._pages:
            app.router.add_get(path, self._serve_metrics)
        app.router.add_get("/healthz", _build_probe(liveness))
        app.router.add_get("/readyz", _build_probe(readiness))
        self._scrapes = 0
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        self.port = settings.port

    async def __aenter__(self) -> HealthServer:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        """Serve a page of metrics, whatever the query is."""
        if self._scrapes >= MAX_SCRAPES:
            return web.Response(status=503, text=f"{MAX_SCRAPES} other requests are being answered; try again")
        self._scrapes += 1
        try:
            page = await self._pages[request.path].read()
            response = web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})
            await _send(response, request)
        finally:
            self._scrapes -= 1
        return response


async def _send(response: web.Response, request: web.Request) -> None:
    """Send a response, or close the connection if the client doesn't read it in time."""
    try:
        async with asyncio.timeout(MAX_SCRAPE_SECONDS):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()


def _build_probe(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        errors = check()
        return web.Response(status=500 if errors else 200, text="\n".join(errors) or "ok")

    return answer
