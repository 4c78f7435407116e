"""Keys to look at: each at most once in the queue and at one worker at a time; timers; backoff for those that fail.

A key whose writes can wait is put off: it comes after all others, once nothing holds it, and after `patience` seconds
in any case. It is still looked at when something happens to it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MORE = 5
"""Times as long changes are gathered while there is something that holds writes back."""
_PAUSE = 0.5
"""Seconds between looks whether those put off are still held."""


class WorkQueue(Generic[K]):
    """Not thread-safe: one event loop's own."""

    def __init__(
        self,
        *,
        backoff: float,
        backoff_limit: float,
        patience: float = 60.0,
        batch: float = 0.0,
        hold: Callable[[], bool] = lambda: False,
        jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backoff = backoff
        self._monotonic = monotonic
        self._backoff_limit = backoff_limit
        self._patience = patience
        self._batch = batch
        self._hold = hold
        self._jitter = jitter
        self._waiting: dict[K, float] = {}  # in order of arrival, with the time of it
        self._put_off: dict[K, float] = {}  # the same, of those that let the others go first
        self._active: set[K] = set()
        self._dirty: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._gathering: dict[K, asyncio.TimerHandle] = {}
        self._calm: set[K] = set()  # those of them about which nothing has to be done
        self._idle: deque[asyncio.Future[None]] = deque()  # workers that wait for a key
        self._pause: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Workers begin now: what came before has not waited for them."""
        self._waiting = dict.fromkeys(self._waiting, self._monotonic())

    def add(self, key: K) -> None:
        """Look at a key soon. One that a worker holds is looked at again after it."""
        if key in self._active:
            self._dirty.add(key)
        elif key not in self._waiting:
            self._waiting[key] = self._monotonic()
            self._wake()

    def add_soon(self, key: K) -> None:
        """Look at a key in a moment: what changes together is looked at once."""
        self._gather(key, self._batch, is_calm=False)

    def add_calmly(self, key: K) -> None:
        """The same, of a change about which nothing has to be done: a key that is put off tells of it in its turn, and
        where writes are held there is time."""
        if key not in self._put_off:
            self._gather(key, self._batch * (_MORE if self._hold() else 1), is_calm=True)

    def put_off(self, key: K) -> None:
        """Write for a key once no other waits and nothing holds it, or when it has waited long enough for that: what
        came calmly is told of then."""
        self._put_off.setdefault(key, self._monotonic())
        if key in self._calm:
            self._stop_gathering(key)

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
        """Look again after a failure: later each time, but no later than a timer says. Returns the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(self._backoff * 2.0 ** min(failures, 30), self._backoff_limit) * self._jitter()
        timer = self._timers.get(key)
        if timer is None or timer.when() > asyncio.get_running_loop().time() + seconds:
            self.add_after(key, seconds)
        return seconds

    def succeed(self, key: K) -> None:
        """The next failure of the key is its first again."""
        self._failures.pop(key, None)

    async def get(self) -> tuple[K, float, bool]:
        """The key that waited longest, for how many seconds, and whether it may not be put off; `done` must follow."""
        while (found := self._next()) is None:
            await self._sleep()
        key, since, is_due = found
        self._stop_gathering(key)
        self._active.add(key)
        return key, self._monotonic() - since, is_due

    async def _sleep(self) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(woken)
        try:
            await woken
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake()  # another worker has to take what this one was woken for
            raise

    def _wake(self) -> None:
        """One worker for one key."""
        while self._idle:
            woken = self._idle.popleft()
            if not woken.done():
                woken.set_result(None)
                return

    def _next(self) -> tuple[K, float, bool] | None:
        """Those put off come after the others, but not for ever. None: nobody waits whom no worker holds."""
        late = next(((k, t) for k, t in self._put_off.items() if k not in self._active), None)
        if late is not None and self._may_pass(late[1]):
            key, since = late
            del self._put_off[key]
            self._waiting.pop(key, None)
            return key, since, True
        if not self._waiting:
            if late is not None:
                self._look_again()
            return None
        key = next(iter(self._waiting))
        return key, self._waiting.pop(key), False

    def _may_pass(self, since: float) -> bool:
        return self._monotonic() - since > self._patience or not self.is_crowded()

    def _look_again(self) -> None:
        """All that sleep, in a moment: those put off come together."""
        if self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(_PAUSE, self._wake_all)

    def _wake_all(self) -> None:
        self._pause = None
        for _ in range(min(len(self._idle), len(self._put_off))):
            self._wake()

    def done(self, key: K) -> None:
        """The worker has let go of the key."""
        self._active.discard(key)
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)
        elif key in self._put_off:
            self._wake()

    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._waiting.keys() | self._put_off.keys())

    def is_crowded(self) -> bool:
        """Whether a write that can wait would hold others up."""
        return bool(self._waiting) or self._hold()

    def oldest(self) -> float:
        """Seconds that the oldest of them has waited."""
        since = [next(iter(group.values())) for group in (self._waiting, self._put_off) if group]
        return self._monotonic() - min(since) if since else 0.0

    def _gather(self, key: K, seconds: float, *, is_calm: bool) -> None:
        if not self._batch:
            self.add(key)
        elif key not in self._waiting:
            loop, known = asyncio.get_running_loop(), self._gathering.get(key)
            is_calm = is_calm and (known is None or key in self._calm)
            if known is None or known.when() > loop.time() + seconds:
                self._stop_gathering(key)
                self._gathering[key] = loop.call_later(seconds, self._gathered, key)
            if is_calm:
                self._calm.add(key)
            else:
                self._calm.discard(key)

    def _gathered(self, key: K) -> None:
        self._gathering.pop(key, None)
        self._calm.discard(key)
        self.add(key)

    def _stop_gathering(self, key: K) -> None:
        self._calm.discard(key)
        timer = self._gathering.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
