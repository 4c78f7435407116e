"""The operator's own HTTP: /metrics for Prometheus, /healthz and /readyz for the kubelet.

Not kopf's liveness endpoint: that one answers 200 whatever its probes find.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sailvl_operator.settings import HealthServerSettings

Problems = Callable[[], Sequence[str]]
"""What is wrong, in words; nothing when all is well."""


class Server:
    """Runs as an asynchronous context manager."""

    def __init__(
        self, settings: HealthServerSettings, registry: CollectorRegistry, *, is_alive: Problems, is_ready: Problems
    ) -> None:
        self._settings = settings
        self._registry = registry
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", _probe(is_alive))
        app.router.add_get("/readyz", _probe(is_ready))
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        self.port = settings.port

    async def __aenter__(self) -> Server:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        """All series, or those of the names asked for, as in /metrics?name[]=sailvl_operator_queue_depth."""
        wanted = request.query.getall("name[]", [])
        registry = self._registry.restricted_registry(wanted) if wanted else self._registry
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _probe(problems: Problems) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        found = problems()
        return web.Response(status=500 if found else 200, text="\n".join(found) or "ok")

    return answer
