"""A fake API server over real HTTP, for tests of the operator's client and of everything that uses it.

It has discovery, lists in pages, watches with bookmarks, preconditions and conflicts. Tests can inject errors, break
watches and compact the history; they assert the objects that it holds, not the calls made.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.api import names
from tests.support.apiserver.objects import parse_path
from tests.support.apiserver.requests import ApiResponse, InMemoryApiServer, build_error
from tests.support.apiserver.watches import Watch


def _describe_resource(plural: str, kind: str) -> dict[str, Any]:
    verbs = ["get", "list", "watch", "patch"]
    return {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}


def _describe_group(name: str, version: str) -> dict[str, Any]:
    served = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [served], "preferredVersion": served}


DISCOVERY: dict[str, Any] = {
    "/version": {"major": "1", "minor": "34"},
    "/api": {"versions": ["v1"]},
    "/api/v1": {"resources": [_describe_resource("namespaces", "Namespace")]},
    "/apis": {"groups": [_describe_group(names.GROUP, names.VERSION), _describe_group("apiextensions.k8s.io", "v1")]},
    "/apis/apiextensions.k8s.io/v1": {
        "resources": [_describe_resource("customresourcedefinitions", "CustomResourceDefinition")]
    },
    f"/apis/{names.API_VERSION}": {"resources": [_describe_resource(names.PLURAL, names.KIND)]},
}
"""The API groups and resources that kopf asks for, by path."""


@dataclass(kw_only=True)
class InjectedError:
    """An error that is answered instead of executing a request, for a number of requests."""

    method: str
    path_end: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1

    def matches(self, request: web.Request) -> bool:
        """Return whether it is still to be answered and this is its request."""
        return self.times > 0 and self.method == request.method and request.path.endswith(self.path_end)


class ReceivedRequest(NamedTuple):
    """A request as the server received it."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any


class AnonymousConfiguration:
    """A Configuration of the kubernetes client library, without credentials."""

    username = ""
    ssl_ca_cert = cert_file = key_file = None
    verify_ssl = True

    def __init__(self, host: str) -> None:
        self.host = host

    def auth_settings(self) -> dict[str, Any]:
        """Return no headers."""
        return {}


class FakeApiServer(InMemoryApiServer):
    """Objects of every kind behind real HTTP; serve it with `serve`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.injected_errors: list[InjectedError] = []
        self.requests: list[ReceivedRequest] = []
        self.watch_seconds = 30.0
        """How long a watch lasts at most."""
        self.transform_content: Callable[[bytes], bytes] = lambda content: content
        """Applied to the body of each response and to each line of a watch, just before it is sent."""
        self._watches: list[_HttpWatch] = []

    @property
    def open_watches(self) -> int:
        """The number of watches that clients read now."""
        return len(self._watches)

    def list_writes(self) -> list[tuple[str, str]]:
        """Return method and path of every request that is not a GET."""
        return [(request.method, request.path) for request in self.requests if request.method != "GET"]

    def remove_named(self, plural: str, name: str, namespace: str = "team") -> None:
        """Remove an object as another client would."""
        self.remove(plural, self.objects[plural][namespace, name])

    def break_watches(self) -> None:
        """End every open watch now."""
        for watch in self._watches:
            watch.end()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of any path."""
        body = json.loads(text) if (text := await request.text()) else None
        self.requests.append(ReceivedRequest(request.method, request.path, dict(request.query), body))
        for error in self.injected_errors:
            if error.matches(request):
                error.times -= 1
                return _to_http(build_error(error.status, "Injected", **error.headers))
        if request.path in DISCOVERY:
            return web.json_response(DISCOVERY[request.path])
        if request.query.get("watch"):
            return await self._answer_watch(request)
        response = self.handle(request.method, request.path, request.query, body, by="the operator")
        return _to_http(replace(response, body=self.transform_content(response.body)))

    async def _answer_watch(self, request: web.Request) -> web.StreamResponse:
        target = parse_path(request.path)
        response = web.StreamResponse()
        await response.prepare(request)
        watch = _HttpWatch(self, target.plural, request.query, namespace=target.namespace)
        watch.open()
        self._watches.append(watch)
        try:
            await watch.send_to(response, seconds=min(self.watch_seconds, watch.timeout_seconds))
        finally:
            self._watches.remove(watch)
            watch.close()
        return response


class _HttpWatch(Watch):
    """A watch whose lines are sent as soon as they are there."""

    def __init__(self, api: FakeApiServer, *args: Any, **options: Any) -> None:
        super().__init__(api, *args, **options)
        self._api = api
        self._lines: deque[bytes] = deque()
        self._has_ended = False

    def queue_line(self, line: bytes) -> None:
        self._lines.append(line)

    def end(self) -> None:
        """Send nothing but a bookmark of what was sent before."""
        self._has_ended = True
        self.has_news.set()

    async def send_to(self, response: web.StreamResponse, *, seconds: float) -> None:
        """Send events until the time is over or the watch is ended; a version that is too old ends it at once."""
        until, sent_version = asyncio.get_running_loop().time() + seconds, 0
        while not self._has_ended:
            self.has_news.clear()
            while self._lines:
                await response.write(self._api.transform_content(self._lines.popleft()))
            if self.is_expired:
                return
            sent_version = self.store.version
            try:
                async with asyncio.timeout_at(until):
                    await self.has_news.wait()
            except TimeoutError:
                break
        await response.write(self.build_bookmark(sent_version))


@asynccontextmanager
async def serve(api: FakeApiServer) -> AsyncIterator[str]:
    """Serve on a free port and yield the URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("/")).rstrip("/")
    finally:
        api.break_watches()
        await server.close()


def _to_http(response: ApiResponse) -> web.Response:
    return web.Response(
        body=response.body, status=response.status, headers=response.headers, content_type="application/json"
    )
