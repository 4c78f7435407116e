"""A reverse proxy in front of a real API server that injects the faults of networks and overloaded servers.

It uses TLS and credentials towards the server and plain HTTP towards the operator, which gets a kubeconfig of its own.
Faults are drawn by `api_faults.py`; tests can also cut the network and hang watches. It runs in a thread.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from sailvl_operator.cluster.credentials import load_credentials
from tests.support.live.api_faults import FaultSchedule

T = TypeVar("T")

_HOP_HEADERS = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding", "authorization"}
_ERRORS = {
    "conflict": (409, "Conflict"),
    "too_many": (429, "TooManyRequests"),
    "error": (503, "ServiceUnavailable"),
    "error_after": (504, "Timeout"),
    "gone": (410, "Expired"),
    "error_event": (500, "InternalError"),
}


class BackgroundLoop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        """Run a coroutine in the loop and return its result, or raise its exception."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def close(self) -> None:
        """Cancel all tasks and stop the thread."""
        self.call(self._cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_others(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardedWrite:
    """A write that reached the API server, with the status of its response."""

    seconds: float
    """Time since the proxy was started."""
    method: str
    path: str
    subject: str
    """The name of the object, or the selector of a collection."""
    status: int


@dataclass(kw_only=True)
class _Cut:
    """A network failure that lasts until it is restored."""

    is_silent: bool
    restored: asyncio.Event = field(default_factory=asyncio.Event)


class FaultyProxy:
    """Use as a context manager; `kubeconfig` leads through the proxy, with the identity of the given one."""

    def __init__(
        self, kubeconfig: str, folder: Path, *, seed: int = 0, page_size: int = 0, watch_seconds: int = 0
    ) -> None:
        """Limit the size of pages and the duration of watches; with 0 they are what the client requests."""
        self._credentials = load_credentials(kubeconfig)
        self._page_size, self._watch_seconds = page_size, watch_seconds
        self.schedule = FaultSchedule(seed)
        self.writes: list[ForwardedWrite] = []
        self.kubeconfig = folder / f"proxy-{seed}.conf"
        self._cut: _Cut | None = None
        self._open: dict[int, web.Request] = {}
        self._watches: set[asyncio.Event] = set()

    def __enter__(self) -> FaultyProxy:
        self._background = BackgroundLoop()
        port = self._background.call(self._start())
        self.kubeconfig.write_text(json.dumps(_build_kubeconfig(port)))
        return self

    def __exit__(self, *_: object) -> None:
        self._background.call(self._stop())
        self._background.close()

    def cut(self, *, silent: bool) -> None:
        """Cut the network: connections are reset or, if silent, stay open without any data."""
        self._background.call(self._start_cut(silent))

    def restore(self) -> None:
        """Restore the network; requests whose clients still wait continue."""
        self._background.call(self._restore())

    def hang_watches(self) -> None:
        """Keep all open watches open without further events."""
        self._background.call(self._hang_watches())

    async def _start_cut(self, silent: bool) -> None:
        self._cut = _Cut(is_silent=silent)
        for request in () if silent else tuple(self._open.values()):
            _reset(request)

    async def _restore(self) -> None:
        cut, self._cut = self._cut, None
        if cut is not None:
            cut.restored.set()

    async def _hang_watches(self) -> None:
        for is_silent in self._watches:
            is_silent.set()

    async def _start(self) -> int:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._credentials.ssl or True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            headers=await self._credentials.headers(),
            auto_decompress=False,
        )
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        await self._start_cut(silent=False)
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body, kind = await request.read(), _classify(request)
        self._open[id(request)] = request
        try:
            if not await self._passes_network(request):
                return _reset(request)
            fault, rng = self.schedule.draw(kind, request.method, request.path, request.query_string)
            if fault == "slow":
                await asyncio.sleep(rng.uniform(0.2, self.schedule.rates.slow_seconds))
            if kind == "watch":
                return await self._answer_watch(request, fault, rng)
            return await self._answer(request, body, kind, fault)
        except (aiohttp.ClientError, ConnectionError):
            return _reset(request)  # the API server or the client is gone
        finally:
            del self._open[id(request)]

    async def _passes_network(self, request: web.Request) -> bool:
        """Return whether the network works, or is restored while the client still waits."""
        while (cut := self._cut) is not None:
            if not cut.is_silent:
                return False
            await cut.restored.wait()
        return _has_client(request)

    async def _answer(self, request: web.Request, body: bytes, kind: str, fault: str) -> web.StreamResponse:
        if fault == "reset_before":
            return _reset(request)
        if fault in _ERRORS and fault != "error_after":
            return _build_error(fault)
        response = await self._forward(request, body, kind)
        if fault == "reset_after" or not await self._passes_network(request):
            return _reset(request)
        if fault == "error_after":
            return _build_error(fault)
        return _truncate(response) if fault == "truncated" else response

    async def _forward(self, request: web.Request, body: bytes, kind: str) -> web.Response:
        url, options = self._redirect(request, "limit", self._page_size)
        async with self._session.request(request.method, url, data=body or None, **options) as response:
            answer = await response.read()
        if kind == "write":
            self.writes.append(
                ForwardedWrite(
                    seconds=self.schedule.seconds(),
                    method=request.method,
                    path=request.path,
                    subject=_find_subject(request, body),
                    status=response.status,
                )
            )
        return web.Response(status=response.status, body=answer, headers=_forward_headers(response.headers))

    def _redirect(self, request: web.Request, limit: str, value: int) -> tuple[str, dict[str, Any]]:
        """Return URL and options of the forwarded request; lower a limiting parameter to `value` unless that is 0."""
        query = dict(request.query)
        if value and limit in query:
            query[limit] = str(min(value, int(query[limit])))
        return self._credentials.server + request.path, {"params": query, "headers": _forward_headers(request.headers)}

    async def _answer_watch(self, request: web.Request, fault: str, rng: random.Random) -> web.StreamResponse:
        if fault == "reset_before":
            return _reset(request)
        if fault in ("too_many", "error") or (fault == "gone" and rng.random() < 0.5):
            return _build_error(fault)
        if fault in ("gone", "error_event"):
            return await _stream_error(request, fault)
        url, options = self._redirect(request, "timeoutSeconds", self._watch_seconds)
        async with self._session.get(url, **options) as upstream:
            answer = web.StreamResponse(status=upstream.status, headers=_forward_headers(upstream.headers))
            await answer.prepare(request)
            lines = _Lines(upstream.content, self._watches)
            is_whole = await self._stream(request, lines, answer, fault, whole_lines=rng.randrange(4))
            return answer if is_whole else _reset(request)

    async def _stream(
        self, request: web.Request, lines: _Lines, answer: web.StreamResponse, fault: str, *, whole_lines: int
    ) -> bool:
        """Forward events and inject a fault after some of them; return False if the connection must be reset."""
        number = 0
        if fault == "hanging" and not whole_lines:
            lines.is_silent.set()
        async for line in lines:
            if not await self._passes_network(request):
                return False
            if fault == "cut" and number == whole_lines:
                await answer.write(line[: len(line) // 2])
                return len(line) % 2 == 0
            await answer.write(line)
            number += 1
            if fault == "hanging" and number == whole_lines:
                lines.is_silent.set()
        while lines.is_silent.is_set() and _has_client(request):
            await asyncio.sleep(0.1)
        return not lines.is_silent.is_set()


class _Lines:
    """The lines of a watch, until it ends or hangs."""

    def __init__(self, stream: aiohttp.StreamReader, watches: set[asyncio.Event]) -> None:
        self._stream, self._watches = stream, watches
        self.is_silent = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pending = b""
        self._watches.add(self.is_silent)
        try:
            while chunk := await self._read():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if self.is_silent.is_set():
                        return
                    yield line + b"\n"
        finally:
            self._watches.discard(self.is_silent)

    async def _read(self) -> bytes:
        futures = [asyncio.ensure_future(self._stream.readany()), asyncio.ensure_future(self.is_silent.wait())]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            return b"" if self.is_silent.is_set() else await futures[0]
        finally:
            for future in futures:
                future.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await future


def _build_kubeconfig(port: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "proxy", "user": {}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        "current-context": "proxy",
    }


def _classify(request: web.Request) -> str:
    if request.method != "GET":
        return "write"
    if request.query.get("watch"):
        return "watch"
    if "continue" in request.query:
        return "page"
    return "list" if "limit" in request.query else "read"


def _find_subject(request: web.Request, body: bytes) -> str:
    if request.method == "POST":
        metadata = json.loads(body)["metadata"]
        return str(metadata.get("name") or metadata["generateName"])
    return request.query.get("labelSelector") or request.path.removesuffix("/status").rpartition("/")[2]


def _has_client(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def _forward_headers(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_HEADERS}


def _status(fault: str) -> dict[str, Any]:
    code, reason = _ERRORS[fault]
    return {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": f"injected {reason}"}


def _build_error(fault: str) -> web.Response:
    headers = {"Retry-After": "1"} if fault == "too_many" else None
    return web.json_response(_status(fault), status=_ERRORS[fault][0], headers=headers)


async def _stream_error(request: web.Request, fault: str) -> web.StreamResponse:
    """Answer with a watch whose first event is an error."""
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    await answer.write(json.dumps({"type": "ERROR", "object": _status(fault)}).encode() + b"\n")
    return answer


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _truncate(response: web.Response) -> web.Response:
    """Return the first half of a response with a matching Content-Length."""
    body = response.body
    assert isinstance(body, bytes)
    return web.Response(status=response.status, body=body[: len(body) // 2], content_type="application/json")
