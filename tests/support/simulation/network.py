"""The network between an operator and the in-memory API server, in virtual time; it replaces aiohttp sessions.

Requests are delayed, rejected, or executed without an answer; watch events are late, and watches break or hang; an
operator's process can end before or after any of its writes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from tests.support.apiserver.objects import parse_path
from tests.support.apiserver.requests import ApiResponse, InMemoryApiServer, build_error
from tests.support.apiserver.watches import Watch

SILENCE_SECONDS = 150.0
"""Time without a byte after which aiohttp ends a watch, as the client configures it."""
REQUEST_TIMEOUT_SECONDS = 30.0
_ERRORS = (
    build_error(409, "Conflict"),
    build_error(429, "TooManyRequests", **{"Retry-After": "1"}),
    build_error(500, "InternalError"),
    build_error(503, "ServiceUnavailable"),
)


@dataclass(kw_only=True)
class NetworkConditions:
    """How likely a request fails, and how late answers and events are."""

    error_rate: float = 0.0
    """Fraction of the requests that change nothing and are answered with an error, or not at all."""
    lost_answer_rate: float = 0.0
    """Fraction of the requests that are executed without an answer reaching the operator."""
    slow_rate: float = 0.0
    """Fraction of the requests that take seconds."""
    max_watch_delay_seconds: float = 0.05

    def reset(self) -> None:
        """Let every request succeed quickly."""
        self.error_rate = self.lost_answer_rate = self.slow_rate = 0.0
        self.max_watch_delay_seconds = 0.05


class Network:
    """All connections to one API server, and the conditions that they share."""

    def __init__(self, api: InMemoryApiServer, rng: random.Random) -> None:
        self.api, self.rng = api, rng
        self.conditions = NetworkConditions()
        self.open_watches: list[SimulatedWatch] = []

    def cut_watches(self) -> None:
        """Break every open watch."""
        for watch in self.open_watches:
            watch.cut()


class OperatorConnection:
    """The connection of one operator process, in place of an aiohttp session."""

    def __init__(self, network: Network, *, operator: str) -> None:
        self.network, self.operator = network, operator
        self.has_died = asyncio.Event()
        """Set when the process ends at one of its writes."""
        self._writes_left: int | None = None
        self._dies_before = False

    def die_at_write(self, number: int, *, before: bool) -> None:
        """End the process before or after a write that is yet to come, 1 being the next."""
        self._writes_left, self._dies_before = number, before

    def never_die(self) -> None:
        """Cancel `die_at_write`."""
        self._writes_left = None

    def request(
        self, method: str, url: URL, *, headers: Mapping[str, str], data: bytes | None = None
    ) -> SimulatedRequest:
        """Return a request to be entered, as `aiohttp.ClientSession.request` does."""
        return SimulatedRequest(self, method, url.path, url.query, data)

    def get(self, url: URL, *, timeout: Any, headers: Mapping[str, str]) -> SimulatedWatch:
        """Return a watch to be entered, as `aiohttp.ClientSession.get` does."""
        return SimulatedWatch(self.network, parse_path(url.path).plural, url.query)

    async def close(self) -> None:
        """Do nothing: there is no connection to close."""

    async def send(self, method: str, path: str, query: Mapping[str, str], data: bytes | None) -> ApiResponse:
        """Execute a request after its delay and return the answer; raise as aiohttp does if either is lost."""
        rng, conditions = self.network.rng, self.network.conditions
        await asyncio.sleep(self._draw_latency())
        drawn = rng.random()
        if drawn < conditions.error_rate:
            return self._draw_error()
        is_counted = method != "GET" and parse_path(path).plural != "events"
        if is_counted:
            await self._die_if_due(before=True)
        body = None if data is None else msgspec.json.decode(data)
        answer = self.network.api.handle(method, path, query, body, by=self.operator)
        if is_counted:
            await self._die_if_due(before=False)
        await asyncio.sleep(self._draw_latency())
        if drawn < conditions.error_rate + conditions.lost_answer_rate:
            raise aiohttp.ServerDisconnectedError("the response was lost")
        return answer

    def _draw_latency(self) -> float:
        rng = self.network.rng
        is_slow = rng.random() < self.network.conditions.slow_rate
        return rng.uniform(0.5, 40.0) if is_slow else rng.uniform(0.001, 0.01)

    def _draw_error(self) -> ApiResponse:
        drawn = self.network.rng.randrange(len(_ERRORS) + 1)
        if drawn == len(_ERRORS):
            raise aiohttp.ClientConnectionError("connection refused")
        return _ERRORS[drawn]

    async def _die_if_due(self, *, before: bool) -> None:
        if self._writes_left is None:
            return
        if before:
            self._writes_left -= 1
        if self._writes_left <= 0 and before == self._dies_before:
            self.has_died.set()
            await asyncio.Event().wait()


class SimulatedRequest:
    """A request and, once entered, its response: the part of `aiohttp.ClientResponse` that the client uses."""

    status = 0
    headers: Mapping[str, str]

    def __init__(self, connection: OperatorConnection, *request: Any) -> None:
        self._connection, self._request = connection, request

    async def __aenter__(self) -> SimulatedRequest:
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            answer = await self._connection.send(*self._request)
        self.status, self.headers, self._body = answer.status, answer.headers, answer.body
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    @property
    def content(self) -> SimulatedRequest:
        """The stream of the response's body."""
        return self

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Yield the body at once."""
        yield self._body

    async def read(self) -> bytes:
        """Return the body."""
        return self._body


class SimulatedWatch(Watch):
    """A watch whose lines arrive in order, each after a delay that is drawn for it."""

    status = 200

    def __init__(self, network: Network, plural: str, query: Mapping[str, str]) -> None:
        super().__init__(network.api, plural, query)
        self._network = network
        self._end = _now() + self.timeout_seconds
        self._pending: list[tuple[float, bytes]] = []
        """Times of arrival and lines."""
        self.is_cut = self.is_hanging = False

    async def __aenter__(self) -> SimulatedWatch:
        await asyncio.sleep(self._network.rng.uniform(0.001, 0.01))
        self._network.open_watches.append(self)
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        self._network.open_watches.remove(self)

    @property
    def content(self) -> SimulatedWatch:
        """The stream of the response's body."""
        return self

    def queue_line(self, line: bytes) -> None:
        if self.is_expired and not self._pending:
            self._pending.append((0.0, line))  # the error comes at once, instead of the events
            return
        earliest = self._pending[-1][0] if self._pending else 0.0
        delay = self._network.rng.uniform(0.0, self._network.conditions.max_watch_delay_seconds)
        self._pending.append((max(earliest, _now() + delay), line))

    def cut(self) -> None:
        """Break the connection; lines that have not arrived are lost."""
        self.is_cut = True
        self.has_news.set()

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Yield lines as they arrive, until the watch times out."""
        while True:
            until = self._pending[0][0] if self._pending else self._end
            self.has_news.clear()
            if until > _now():
                await self._wait_until(until)
            if self.is_cut:
                raise aiohttp.ClientPayloadError("the connection was cut")
            if self._pending and self._pending[0][0] <= _now():
                yield self._pending.pop(0)[1]
            elif not self._pending and _now() >= self._end:
                return

    async def _wait_until(self, until: float) -> None:
        if self.is_hanging:
            await asyncio.sleep(SILENCE_SECONDS)
            raise TimeoutError("no data before the timeout")
        try:
            async with asyncio.timeout_at(until):
                await self.has_news.wait()
        except TimeoutError:
            return


def _now() -> float:
    return asyncio.get_running_loop().time()
