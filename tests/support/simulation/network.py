"""What lies between an operator and the model's API server, in the place of an aiohttp session: delays, refusals, lost
answers, late and broken watches, and the operator's death before or after any of its writes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from tests.support.simulation.api import Answer, ModelApi, Watch, refuse, split_path

_REFUSALS = (
    refuse(409, "Conflict"),
    refuse(429, "TooManyRequests", **{"Retry-After": "1"}),
    refuse(500, "InternalError"),
    refuse(503, "ServiceUnavailable"),
)


@dataclass(kw_only=True)
class Weather:
    """How likely a request fails, and how late things are."""

    refused: float = 0.0
    """Part of the requests that are answered with an error, or not at all, and change nothing."""
    lost: float = 0.0
    """Part of the requests that are carried out, and the answer never comes."""
    slow: float = 0.0
    """Part of the requests that take seconds."""
    lag: float = 0.05
    """Seconds that watch events are late, at most."""

    def clear_up(self) -> None:
        """Nothing goes wrong any more."""
        self.refused = self.lost = self.slow = 0.0
        self.lag = 0.05


class Wire:
    """One operator's way to the API server."""

    def __init__(self, api: ModelApi, weather: Weather, rng: random.Random, *, name: str) -> None:
        self.api, self.weather, self.name = api, weather, name
        self.watches: list[Watch] = []
        self.death = asyncio.Event()
        self._rng = rng
        self._writes_left: int | None = None
        self._dies_before = False

    def die_at_write(self, number: int, *, before: bool) -> None:
        """The process ends around its write of this number from now, 1 being the next."""
        self._writes_left, self._dies_before = number, before

    def request(self, method: str, url: URL, *, headers: Mapping[str, str], data: bytes | None = None) -> Exchange:
        return Exchange(self, method, url.path, url.query, data)

    def get(self, url: URL, *, timeout: Any, headers: Mapping[str, str]) -> Watch:
        """A watch."""
        self.watches = [w for w in self.watches if w in self.api.watches]
        watch = Watch(self.api, split_path(url.path)[1], url.query, lambda: self._rng.uniform(0.0, self.weather.lag))
        self.watches.append(watch)
        return watch

    async def close(self) -> None:
        pass

    async def carry(self, method: str, path: str, params: Mapping[str, str], data: bytes | None) -> Answer:
        """There and back, if all goes well."""
        await asyncio.sleep(self._latency())
        drawn = self._rng.random()
        if drawn < self.weather.refused:
            return self._refuse()
        if method != "GET" and split_path(path)[1] != "events":
            await self._maybe_die(before=True)
        body = None if data is None else msgspec.json.decode(data)
        answer = self.api.handle(method, path, params, body, by=self.name)
        if method != "GET" and split_path(path)[1] != "events":
            await self._maybe_die(before=False)
        await asyncio.sleep(self._latency())
        if drawn < self.weather.refused + self.weather.lost:
            raise aiohttp.ServerDisconnectedError("the answer was lost")
        return answer

    def _latency(self) -> float:
        is_slow = self._rng.random() < self.weather.slow
        return self._rng.uniform(0.5, 40.0) if is_slow else self._rng.uniform(0.001, 0.01)

    def _refuse(self) -> Answer:
        drawn = self._rng.randrange(len(_REFUSALS) + 1)
        if drawn == len(_REFUSALS):
            raise aiohttp.ClientConnectionError("connection refused")
        return _REFUSALS[drawn]

    async def _maybe_die(self, *, before: bool) -> None:
        if self._writes_left is None:
            return
        if before:
            self._writes_left -= 1
        if self._writes_left <= 0 and before == self._dies_before:
            self.death.set()
            await asyncio.Event().wait()


class Exchange:
    """A request and its answer, as aiohttp gives it."""

    status = 0
    headers: Mapping[str, str]

    def __init__(self, wire: Wire, method: str, path: str, params: Mapping[str, str], data: bytes | None) -> None:
        self._wire, self._what = wire, (method, path, params, data)

    async def __aenter__(self) -> Exchange:
        async with asyncio.timeout(30.0):
            answer = await self._wire.carry(*self._what)
        self.status, self.headers, self._body = answer.status, answer.headers, answer.body
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        return self._body
