"""When keys are looked at: groups of changes, failures beside timers, the beginning."""

from __future__ import annotations

import asyncio

from sailvl_operator.cluster.workqueue import WorkQueue


async def test_a_failure_doesn_t_put_a_timer_off():
    queue = WorkQueue[str](backoff=5, backoff_limit=5)
    queue.add_after("a", 0.02)
    queue.retry("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.done("a")


async def test_what_came_before_the_workers_has_not_waited_for_them():
    queue = WorkQueue[str](backoff=1, backoff_limit=1)
    queue.add("a")
    await asyncio.sleep(0.05)
    queue.begin()
    assert queue.oldest() < 0.05


async def test_what_changes_together_is_looked_at_once():
    queue = WorkQueue[str](backoff=1, backoff_limit=1, batch=0.05)
    for _ in range(3):
        queue.add_soon("a")
        await asyncio.sleep(0.01)
    assert queue.depth() == 0
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.add_soon("a")
    queue.done("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a", "a change while it was looked at"
    queue.done("a")
    queue.add_soon("a")
    queue.add("a")
    await queue.get()
    queue.done("a")
    await asyncio.sleep(0.1)
    assert queue.depth() == 0, "gathered changes went with the look that came first"
