"""A reverse proxy before a real API server that does to requests what networks and overloaded servers do.

TLS and credentials towards the server, plain HTTP towards the operator, which gets a kubeconfig of its own. What
happens is drawn by `api_faults.py`, or asked for by a test: a cut network, silent watches. It runs in a thread.
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
from tests.support.live.api_faults import Dice

T = TypeVar("T")

_NOT_PASSED_ON = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding", "authorization"}
_REFUSALS = {
    "conflict": (409, "Conflict"),
    "too_many": (429, "TooManyRequests"),
    "error": (503, "ServiceUnavailable"),
    "error_after": (504, "Timeout"),
    "gone": (410, "Expired"),
    "error_event": (500, "InternalError"),
}


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        """Its result, or its exception."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def close(self) -> None:
        """Ends what still runs in it."""
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
class Write:
    """A write that reached the API server, and its answer."""

    seconds: float
    """Since the proxy began."""
    method: str
    path: str
    about: str
    """The object's name; of a collection, its selector."""
    status: int


@dataclass(kw_only=True)
class _Cut:
    """Between the cut and the mending of the network."""

    is_silent: bool
    healed: asyncio.Event = field(default_factory=asyncio.Event)


class FaultyProxy:
    """Use as a context manager; `kubeconfig` leads through it, as whoever the given one makes of its bearer."""

    def __init__(
        self, kubeconfig: str, folder: Path, *, seed: int = 0, page_size: int = 0, watch_seconds: int = 0
    ) -> None:
        """Lists come in pages of so many objects, and watches end after so many seconds; 0: as they are asked for."""
        self._credentials = load_credentials(kubeconfig)
        self._page_size, self._watch_seconds = page_size, watch_seconds
        self.dice = Dice(seed)
        self.writes: list[Write] = []
        self.kubeconfig = folder / f"proxy-{seed}.conf"
        self._cut: _Cut | None = None
        self._open: dict[int, web.Request] = {}
        self._watches: set[asyncio.Event] = set()

    def __enter__(self) -> FaultyProxy:
        self._background = Background()
        port = self._background.call(self._start())
        self.kubeconfig.write_text(json.dumps(_build_kubeconfig(port)))
        return self

    def __exit__(self, *_: object) -> None:
        self._background.call(self._stop())
        self._background.close()

    def cut(self, *, silent: bool) -> None:
        """The network goes: connections are reset, or (silent) stay open while nothing comes through."""
        self._background.call(self._begin_cut(silent))

    def heal(self) -> None:
        """It is back; of what was held back, that goes on whose sender still waits for it."""
        self._background.call(self._end_cut())

    def hang_watches(self) -> None:
        """All watches that are open now stay so, and nothing comes by them any more."""
        self._background.call(self._silence())

    async def _begin_cut(self, silent: bool) -> None:
        self._cut = _Cut(is_silent=silent)
        for request in () if silent else tuple(self._open.values()):
            _reset(request)

    async def _end_cut(self) -> None:
        cut, self._cut = self._cut, None
        if cut is not None:
            cut.healed.set()

    async def _silence(self) -> None:
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
        await self._begin_cut(silent=False)
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body, kind = await request.read(), _classify(request)
        self._open[id(request)] = request
        try:
            if not await self._gets_through(request):
                return _reset(request)
            fault, chances = self.dice.draw(kind, request.method, request.path, request.query_string)
            if fault == "slow":
                await asyncio.sleep(chances.uniform(0.2, self.dice.faults.slow_seconds))
            if kind == "watch":
                return await self._answer_watch(request, fault, chances)
            return await self._answer(request, body, kind, fault)
        except (aiohttp.ClientError, ConnectionError):
            return _reset(request)  # the API server is not there, or whoever asked has gone
        finally:
            del self._open[id(request)]

    async def _gets_through(self, request: web.Request) -> bool:
        """Whether the network is there, or comes back while somebody still waits."""
        while (cut := self._cut) is not None:
            if not cut.is_silent:
                return False
            await cut.healed.wait()
        return _is_waited_for(request)

    async def _answer(self, request: web.Request, body: bytes, kind: str, fault: str) -> web.StreamResponse:
        if fault == "reset_before":
            return _reset(request)
        if fault in _REFUSALS and fault != "error_after":
            return _refuse(fault)
        response = await self._forward(request, body, kind)
        if fault == "reset_after" or not await self._gets_through(request):
            return _reset(request)
        if fault == "error_after":
            return _refuse(fault)
        return _half(response) if fault == "truncated" else response

    async def _forward(self, request: web.Request, body: bytes, kind: str) -> web.Response:
        url, options = self._redirect(request, "limit", self._page_size)
        async with self._session.request(request.method, url, data=body or None, **options) as response:
            answer = await response.read()
        if kind == "write":
            self.writes.append(
                Write(
                    seconds=self.dice.seconds(),
                    method=request.method,
                    path=request.path,
                    about=_find_subject(request, body),
                    status=response.status,
                )
            )
        return web.Response(status=response.status, body=answer, headers=_pass_on(response.headers))

    def _redirect(self, request: web.Request, limit: str, value: int) -> tuple[str, dict[str, Any]]:
        """Where a request goes and with what; a parameter that limits it is lowered to a value other than 0."""
        query = dict(request.query)
        if value and limit in query:
            query[limit] = str(min(value, int(query[limit])))
        return self._credentials.server + request.path, {"params": query, "headers": _pass_on(request.headers)}

    async def _answer_watch(self, request: web.Request, fault: str, chances: random.Random) -> web.StreamResponse:
        if fault == "reset_before":
            return _reset(request)
        if fault in ("too_many", "error") or (fault == "gone" and chances.random() < 0.5):
            return _refuse(fault)
        if fault in ("gone", "error_event"):
            return await _tell_error(request, fault)
        url, options = self._redirect(request, "timeoutSeconds", self._watch_seconds)
        async with self._session.get(url, **options) as upstream:
            answer = web.StreamResponse(status=upstream.status, headers=_pass_on(upstream.headers))
            await answer.prepare(request)
            lines = _Lines(upstream.content, self._watches)
            is_whole = await self._stream(request, lines, answer, fault, whole_lines=chances.randrange(4))
            return answer if is_whole else _reset(request)

    async def _stream(
        self, request: web.Request, lines: _Lines, answer: web.StreamResponse, fault: str, *, whole_lines: int
    ) -> bool:
        """Events; a fault comes after some whole ones. False: whoever watches must not think that this is the end."""
        number = 0
        if fault == "hanging" and not whole_lines:
            lines.is_silent.set()
        async for line in lines:
            if not await self._gets_through(request):
                return False
            if fault == "cut" and number == whole_lines:
                await answer.write(line[: len(line) // 2])
                return len(line) % 2 == 0
            await answer.write(line)
            number += 1
            if fault == "hanging" and number == whole_lines:
                lines.is_silent.set()
        while lines.is_silent.is_set() and _is_waited_for(request):
            await asyncio.sleep(0.1)
        return not lines.is_silent.is_set()


class _Lines:
    """The lines of a watch, until it ends or has to be silent."""

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
        ways = [asyncio.ensure_future(self._stream.readany()), asyncio.ensure_future(self.is_silent.wait())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            return b"" if self.is_silent.is_set() else await ways[0]
        finally:
            for way in ways:
                way.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await way


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


def _is_waited_for(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def _pass_on(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_PASSED_ON}


def _status(fault: str) -> dict[str, Any]:
    code, reason = _REFUSALS[fault]
    return {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": f"injected {reason}"}


def _refuse(fault: str) -> web.Response:
    headers = {"Retry-After": "1"} if fault == "too_many" else None
    return web.json_response(_status(fault), status=_REFUSALS[fault][0], headers=headers)


async def _tell_error(request: web.Request, fault: str) -> web.StreamResponse:
    """A watch whose first event is an error."""
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    await answer.write(json.dumps({"type": "ERROR", "object": _status(fault)}).encode() + b"\n")
    return answer


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _half(response: web.Response) -> web.Response:
    """As if it were whole."""
    body = response.body
    assert isinstance(body, bytes)
    return web.Response(status=response.status, body=body[: len(body) // 2], content_type="application/json")
