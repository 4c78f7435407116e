"""Changes of a run's children come in groups."""

from __future__ import annotations

import asyncio

from sailvl_operator.cluster.workqueue import WorkQueue


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
