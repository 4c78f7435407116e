"""Work queue of keys, after client-go's: each key is queued once and is held by one worker at a time; timers and
backoff for keys whose reconcile failed.

Keys of different namespaces take turns, and one namespace holds only a part of the workers. A key whose writes can wait
is deferred: it comes after all other keys of its namespace and only when that has no backpressure, but after
`max_defer_seconds` in any case. An important change of a deferred key still queues it at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Generic, NamedTuple, TypeVar

from sailvl_operator.cluster.fair_queue import FairQueue

K = TypeVar("K", bound=Hashable)

_ROUTINE_FACTOR = 5
"""Under backpressure, routine changes are debounced this many times longer."""
_RECHECK_SECONDS = 0.5
"""Seconds between checks of backpressure while only deferred keys are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueConfig:
    """Times of a work queue in seconds. The operator runs with the defaults."""

    backoff_seconds: float = 0.5
    """Backoff before a failed key is reconciled again. It doubles with each failure in a row and is jittered."""
    backoff_limit_seconds: float = 60.0
    """Maximum backoff."""
    max_defer_seconds: float = 60.0
    """Maximum time for which a key is deferred."""
    debounce_seconds: float = 0.2
    """How long `add_debounced` waits for further changes of a key; changes of Jobs and pods come in groups. 0 disables
    it."""


class _Arrival(NamedTuple):
    """When a key was queued or deferred, and whether it must not be deferred again."""

    at: float
    is_due: bool = False


class WorkQueue(Generic[K]):
    """Keys to reconcile. Not thread-safe: all calls come from one event loop.

    `group_by`: the group of a key, its namespace; groups take turns. `has_backpressure`: whether deferred keys of a
    key's group should wait although no other of its keys does. `jitter`: factor for each backoff.
    """

    def __init__(
        self,
        config: QueueConfig | None = None,
        *,
        group_by: Callable[[K], Hashable] = lambda _: None,
        has_backpressure: Callable[[K], bool] = lambda _: False,
        jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config or QueueConfig()
        self._has_backpressure = has_backpressure
        self._jitter = jitter
        self._monotonic = monotonic
        self._group_by = group_by
        self._waiting: FairQueue[K, _Arrival] = FairQueue(group_by)
        self._deferred: FairQueue[K, _Arrival] = FairQueue(group_by)
        self._deferred_at: OrderedDict[K, float] = OrderedDict()  # the deferred keys of all groups, oldest first
        self._active: set[K] = set()  # held by a worker
        self._active_of_group: Counter[Hashable] = Counter()
        self._workers = inf
        self._dirty: set[K] = set()  # changed while a worker holds them
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._debounce_timers: dict[K, asyncio.TimerHandle] = {}
        self._routine: set[K] = set()  # debounced keys with routine changes only
        self._idle: deque[asyncio.Future[None]] = deque()  # workers that wait for a key
        self._recheck_timer: asyncio.TimerHandle | None = None
        self._taken_at = monotonic()  # when a worker took a key, or no key was waiting

    def start(self, workers: int) -> None:
        """Start with some workers, and restart the waiting times: no worker has kept the keys waiting until now."""
        self._workers = workers
        keys = [key for group in self._waiting.list_groups() for key in group]
        for key in keys:
            self._waiting.remove(key)
            self._waiting.add(key, _Arrival(self._monotonic()))
        self._taken_at = self._monotonic()

    def add(self, key: K) -> None:
        """Queue a key now. If a worker holds the key, queue it when the worker is done."""
        if key in self._active:
            self._dirty.add(key)
        elif key not in self._waiting:
            if not self._waiting:
                self._taken_at = self._monotonic()
            self._waiting.add(key, _Arrival(self._monotonic()))
            self._wake_worker()

    def add_debounced(self, key: K, *, routine: bool = False) -> None:
        """Queue a key after `debounce_seconds`, so that changes which come together are reconciled together.

        A routine change needs no action, only a status update (for example: a pod became Running). It does not queue a
        deferred key, and under backpressure it is debounced five times longer.
        """
        if not routine:
            self._debounce(key, self._config.debounce_seconds, routine=False)
        elif key not in self._deferred_at:
            factor = _ROUTINE_FACTOR if self._has_backpressure(key) else 1
            self._debounce(key, self._config.debounce_seconds * factor, routine=True)

    def defer(self, key: K) -> None:
        """Queue a key behind all others of its group until there is no backpressure or `max_defer_seconds` have passed.
        Pending routine changes of the key are covered by this."""
        if key not in self._deferred_at:
            self._deferred_at[key] = self._monotonic()
            self._deferred.add(key, _Arrival(self._deferred_at[key], is_due=True))
            self._schedule_recheck()
        if key in self._routine:
            self._cancel_debounce(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Queue a key after some seconds. Replaces the key's earlier timer."""
        self.cancel_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(max(0.0, seconds), self._on_timer, key)

    def cancel_timer(self, key: K) -> None:
        """Cancel the timer that `add_after` set, if any."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def retry(self, key: K) -> float:
        """Queue a failed key with exponential backoff, or earlier if its timer fires earlier. Return the backoff in
        seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        backoff = min(self._config.backoff_seconds * 2.0 ** min(failures, 30), self._config.backoff_limit_seconds)
        seconds = backoff * self._jitter()
        timer = self._timers.get(key)
        if timer is None or timer.when() > asyncio.get_running_loop().time() + seconds:
            self.add_after(key, seconds)
        return seconds

    def reset_backoff(self, key: K) -> None:
        """Forget the failures of a key after it was reconciled."""
        self._failures.pop(key, None)

    async def get(self) -> tuple[K, float, bool]:
        """Wait for the next key. Return it, the seconds that it was queued, and whether it was deferred and must not
        be deferred again. The worker must call `done` afterwards."""
        while (found := self._pop()) is None:
            await self._wait_for_key()
        key, arrival = found
        self._cancel_debounce(key)
        self._active.add(key)
        self._active_of_group[self._group_by(key)] += 1
        self._taken_at = self._monotonic()
        return key, self._taken_at - arrival.at, arrival.is_due

    def done(self, key: K) -> None:
        """Release a key. If it changed meanwhile, queue it again."""
        self._active.discard(key)
        self._active_of_group[self._group_by(key)] -= 1
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)
        elif self._waiting or key in self._deferred_at:
            self._wake_worker()

    def depth(self) -> int:
        """Return the number of keys that wait for a worker, deferred ones included."""
        return len(self._waiting) + sum(key not in self._waiting for key in self._deferred_at)

    def has_backlog(self, key: K) -> bool:
        """Whether a write of this key that can wait would delay something else: another key of its group waits, or
        there is backpressure."""
        return bool(self._waiting.get_group(key)) or self._has_backpressure(key)

    def oldest_seconds(self) -> float:
        """Return the waiting time of the oldest key; 0 if no key waits."""
        arrivals = [arrival.at for queue in (self._waiting, self._deferred) for arrival in queue.heads()]
        return self._monotonic() - min(arrivals) if arrivals else 0.0

    def stalled_seconds(self) -> float:
        """Return for how long keys have been waiting without a worker taking any; 0 if no key waits."""
        return self._monotonic() - self._taken_at if self._waiting else 0.0

    def _pop(self) -> tuple[K, _Arrival] | None:
        """Return the next key with its arrival; None if none may be taken now."""
        self._promote_overdue()
        if (found := self._waiting.pop_where(self._may_take)) is None:
            self._promote_deferred()
            found = self._waiting.pop_where(self._may_take)
        if found is not None and not self._waiting.get_group(found[0]):
            self._promote_next(self._deferred.get_group(found[0]))
        return found

    def _may_take(self, group: Hashable) -> bool:
        """Whether a group may hold one more worker: it holds less than twice as many as are free. Even several groups
        with slow keys leave some."""
        return self._active_of_group[group] < 2 * (self._workers - len(self._active))

    def _promote_overdue(self) -> None:
        """Queue the keys that have been deferred for `max_defer_seconds`."""
        until = self._monotonic() - self._config.max_defer_seconds
        while self._deferred_at:
            key, since = next(iter(self._deferred_at.items()))
            if since >= until:
                return
            self._promote(key)

    def _promote_deferred(self) -> None:
        """Queue the oldest deferred key of every group in which no other key waits."""
        for group in self._deferred.list_groups():
            if not self._waiting.get_group(next(iter(group))):
                self._promote_next(group)

    def _promote_next(self, group: Mapping[K, _Arrival]) -> None:
        """Queue the oldest key of a group of deferred keys, unless there is backpressure."""
        key = next((key for key in group if key not in self._active), None)
        if key is not None and not self._has_backpressure(key):
            self._promote(key)

    def _promote(self, key: K) -> None:
        """Queue a deferred key in place of its other arrival, if it has one; a worker that holds the key covers it."""
        del self._deferred_at[key]
        arrival = self._deferred.remove(key)
        if key in self._active or arrival is None:
            self._dirty.add(key)
        else:
            self._waiting.remove(key)
            self._waiting.add(key, arrival)

    async def _wait_for_key(self) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(woken)
        try:
            await woken
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake_worker()  # pass the key on, since this worker was cancelled after it had been woken
            raise

    def _wake_worker(self) -> None:
        while self._idle:
            woken = self._idle.popleft()
            if not woken.done():
                woken.set_result(None)
                return

    def _schedule_recheck(self) -> None:
        if self._recheck_timer is None:
            self._recheck_timer = asyncio.get_running_loop().call_later(_RECHECK_SECONDS, self._recheck_deferred)

    def _recheck_deferred(self) -> None:
        """Wake as many workers as there are deferred keys, since all of them become due together."""
        self._recheck_timer = None
        if self._deferred_at:
            self._promote_overdue()
            self._promote_deferred()
            self._schedule_recheck()
        for _ in range(min(len(self._idle), len(self._deferred) + len(self._waiting))):
            self._wake_worker()

    def _debounce(self, key: K, seconds: float, *, routine: bool) -> None:
        if not self._config.debounce_seconds:
            self.add(key)
        elif key not in self._waiting:
            loop, timer = asyncio.get_running_loop(), self._debounce_timers.get(key)
            routine = routine and (timer is None or key in self._routine)
            if timer is None or timer.when() > loop.time() + seconds:
                self._cancel_debounce(key)
                self._debounce_timers[key] = loop.call_later(seconds, self._on_debounced, key)
            if routine:
                self._routine.add(key)
            else:
                self._routine.discard(key)

    def _on_debounced(self, key: K) -> None:
        self._debounce_timers.pop(key, None)
        self._routine.discard(key)
        self.add(key)

    def _cancel_debounce(self, key: K) -> None:
        self._routine.discard(key)
        timer = self._debounce_timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _on_timer(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
