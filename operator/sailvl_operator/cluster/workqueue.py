"""Keys to look at: each at most once in the queue and at one worker at a time; timers; backoff for those that fail."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Not thread-safe: one event loop's own."""

    def __init__(
        self, *, backoff: float, backoff_limit: float, jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25)
    ) -> None:
        self._backoff = backoff
        self._backoff_limit = backoff_limit
        self._jitter = jitter
        self._waiting: dict[K, float] = {}  # in order of arrival, with the time of it
        self._active: set[K] = set()
        self._dirty: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._arrived = asyncio.Event()

    def add(self, key: K) -> None:
        """Look at a key soon. One that a worker holds is looked at again after it."""
        if key in self._active:
            self._dirty.add(key)
        elif key not in self._waiting:
            self._waiting[key] = time.monotonic()
            self._arrived.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Look at a key later; replaces its earlier timer."""
        self.cancel_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(max(0.0, seconds), self._fire, key)

    def cancel_timer(self, key: K) -> None:
        """Forget what `add_after` asked for."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def retry(self, key: K) -> float:
        """Look again after a failure: later each time. Returns the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(self._backoff * 2.0 ** min(failures, 30), self._backoff_limit) * self._jitter()
        self.add_after(key, seconds)
        return seconds

    def succeed(self, key: K) -> None:
        """The next failure of the key is its first again."""
        self._failures.pop(key, None)

    async def get(self) -> tuple[K, float]:
        """The key that waited longest, and for how many seconds; `done` must follow."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        key = next(iter(self._waiting))
        since = self._waiting.pop(key)
        self._active.add(key)
        return key, time.monotonic() - since

    def done(self, key: K) -> None:
        """The worker has let go of the key."""
        self._active.discard(key)
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)

    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._waiting)

    def oldest(self) -> float:
        """Seconds that the oldest of them has waited."""
        return time.monotonic() - next(iter(self._waiting.values())) if self._waiting else 0.0

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
