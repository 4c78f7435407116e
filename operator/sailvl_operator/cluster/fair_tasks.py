"""Tasks for background work, as reads and Events, of which one namespace can hold only a part.

A namespace whose requests are slow or refused keeps its own items waiting, and those of no other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from math import inf
from typing import Generic, TypeVar

from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.fair_queue import FairQueue

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FairTasks(Generic[K, V]):
    """Runs a task for each item: at most `limit` at a time, and at most `group_limit` of one group. Groups take turns.

    `loop`: name of the loop that the tasks belong to, for the log and the count of errors. `work`: works on one item.
    `group_by`: returns the group of a key. `queue_limit` and `group_queue_limit`: items that may wait in total and of
    one group; if there are more, the oldest one of that group, or of the largest group, is dropped. `on_drop`: called
    for each dropped item. `count_error`: called for each unexpected error.
    """

    def __init__(
        self,
        loop: str,
        work: Callable[[K, V], Awaitable[None]],
        *,
        group_by: Callable[[K], Hashable],
        limit: int,
        group_limit: int,
        queue_limit: float = inf,
        group_queue_limit: float = inf,
        on_drop: Callable[[], None] = lambda: None,
        count_error: CountError = ignore_count,
    ) -> None:
        self._loop = loop
        self._work = work
        self._group_by = group_by
        self._limit = limit
        self._group_limit = group_limit
        self._queue_limit = queue_limit
        self._group_queue_limit = group_queue_limit
        self._on_drop = on_drop
        self._count_error = count_error
        self._waiting: FairQueue[K, V] = FairQueue(group_by)
        self._tasks: dict[K, asyncio.Task[None]] = {}
        self._running: Counter[Hashable] = Counter()  # tasks by group
        self._is_started = False

    def __contains__(self, key: K) -> bool:
        return key in self._tasks or key in self._waiting

    def __len__(self) -> int:
        return len(self._tasks) + len(self._waiting)

    def count_group(self, key: K) -> int:
        """Return how many items of a key's group wait or are worked on."""
        return self._running[self._group_by(key)] + len(self._waiting.get_group(key))

    def add(self, key: K, item: V) -> None:
        """Add an item, unless one with this key waits or is worked on."""
        if key in self:
            return
        self._waiting.add(key, item)
        self._start_next()
        if len(self._waiting.get_group(key)) > self._group_queue_limit:
            self._waiting.drop_oldest(key)
            self._on_drop()
        elif len(self._waiting) > self._queue_limit:
            self._waiting.drop_oldest_of_largest_group()
            self._on_drop()

    async def run(self) -> None:
        """Work on items until cancelled; the tasks that have not ended are then cancelled."""
        self._is_started = True
        try:
            self._start_next()
            await asyncio.get_running_loop().create_future()
        finally:
            self._is_started = False
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Work on items until none is left."""
        running = asyncio.create_task(self.run())
        try:
            await asyncio.sleep(0)
            while self._tasks:
                await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _start_next(self) -> None:
        while self._is_started and len(self._tasks) < self._limit:
            found = self._waiting.pop_where(lambda group: self._running[group] < self._group_limit)
            if found is None:
                return
            key, item = found
            self._running[self._group_by(key)] += 1
            task = self._tasks[key] = asyncio.create_task(self._run_task(key, item), name=f"{self._loop}: {key}")
            task.add_done_callback(partial(self._on_done, key))

    async def _run_task(self, key: K, item: V) -> None:
        with contain_errors(self._loop, self._count_error, subject=str(key)):
            await self._work(key, item)

    def _on_done(self, key: K, _: asyncio.Task[None]) -> None:
        group = self._group_by(key)
        self._running[group] -= 1
        if not self._running[group]:
            del self._running[group]
        del self._tasks[key]
        self._start_next()


class Pacer:
    """Spaces the turns of several tasks evenly."""

    def __init__(self) -> None:
        self._next_at = 0.0

    async def wait_turn(self, pause_seconds: float) -> None:
        """Wait until the turns before this one are over, each of which takes its own `pause_seconds`."""
        now = asyncio.get_running_loop().time()
        at = max(now, self._next_at)
        self._next_at = at + pause_seconds
        if at > now:
            await asyncio.sleep(at - now)
