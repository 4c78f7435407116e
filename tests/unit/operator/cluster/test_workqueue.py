"""Work queue: order, debounce, deferral, timers and backoff."""

from __future__ import annotations

import asyncio

import pytest

from sailvl_operator.cluster.workqueue import QueueConfig, WorkQueue


def build_queue(*, has_backpressure: bool = False, **config: float) -> WorkQueue[str]:
    fields = {"backoff_seconds": 0.02, "backoff_limit_seconds": 0.05, "debounce_seconds": 0.0}
    return WorkQueue(QueueConfig(**fields | config), has_backpressure=lambda _: has_backpressure, jitter=lambda: 1.0)


async def test_key_is_queued_once_and_held_by_one_worker():
    queue = build_queue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert queue.depth() == 2
    assert (await queue.get())[0] == "a"
    queue.add("a")
    assert (await queue.get())[0] == "b"
    assert queue.depth() == 0, "a worker holds the key"
    queue.done("a")
    queue.done("b")
    assert (await queue.get())[0] == "a", "the key changed while a worker held it"
    assert queue.depth() == 0


async def test_backoff_grows_until_it_is_reset():
    queue = build_queue()
    assert [queue.retry("a") for _ in range(3)] == [0.02, 0.04, 0.05]
    queue.reset_backoff("a")
    assert queue.retry("a") == 0.02
    async with asyncio.timeout(1):
        assert (await queue.get())[0] == "a"


async def test_later_timer_replaces_earlier_one():
    queue = build_queue()
    queue.add_after("a", 0.01)
    queue.add_after("a", 30.0)
    queue.add_after("b", 0.01)
    queue.add_after("c", 0.01)
    queue.cancel_timer("c")
    await asyncio.sleep(0.05)
    assert queue.depth() == 1
    assert 0.0 < queue.oldest_seconds() < 1.0
    queue.cancel_timer("a")


async def test_backoff_does_not_postpone_an_earlier_timer():
    queue = build_queue(backoff_seconds=5, backoff_limit_seconds=5)
    queue.add_after("a", 0.02)
    queue.retry("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.done("a")


async def test_waiting_times_count_from_the_start_of_the_workers():
    queue = build_queue()
    queue.add("a")
    await asyncio.sleep(0.05)
    queue.start(1)
    assert queue.oldest_seconds() < 0.05


async def test_changes_within_the_debounce_are_reconciled_together():
    queue = build_queue(debounce_seconds=0.3)
    for _ in range(3):
        queue.add_debounced("a")
        await asyncio.sleep(0.01)
    assert queue.depth() == 0
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.add_debounced("a")
    queue.done("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a", "the key changed while a worker held it"
    queue.done("a")
    queue.add_debounced("a")
    queue.add("a")
    await queue.get()
    queue.done("a")
    await asyncio.sleep(0.5)
    assert queue.depth() == 0, "the earlier reconcile covers the debounced change"


@pytest.fixture
def loaded() -> tuple[WorkQueue[str], list[str]]:
    """A queue, and a list: there is backpressure while it isn't empty."""
    load = ["other runs start"]
    config = QueueConfig(debounce_seconds=0.0, max_defer_seconds=2.0)
    return WorkQueue(config, has_backpressure=lambda _: bool(load)), load


async def test_deferred_keys_wait_for_the_end_of_backpressure_and_then_come_together(loaded):
    queue, load = loaded
    for key in "abc":
        queue.defer(key)
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0.7)
    assert not any(worker.done() for worker in workers)
    load.clear()
    found = await asyncio.wait_for(asyncio.gather(*workers), 1)
    assert sorted((key, is_due) for key, _, is_due in found) == [("a", True), ("b", True), ("c", True)]


@pytest.mark.slow
async def test_deferral_is_limited_in_time(loaded):
    queue, _ = loaded
    queue.defer("a")
    _, waited, is_due = await asyncio.wait_for(queue.get(), 3.5)
    assert is_due
    assert waited > 2.0


async def test_deferred_key_ignores_routine_changes(loaded):
    queue, load = loaded
    queue.defer("a")
    queue.add_debounced("a", routine=True)
    queue.add_debounced("b", routine=True)
    assert (await asyncio.wait_for(queue.get(), 0.1))[0] == "b"
    load.clear()
    assert (await asyncio.wait_for(queue.get(), 1))[::2] == ("a", True)


@pytest.mark.parametrize("is_routine", [True, False], ids=["routine", "important"])
async def test_deferring_a_key_covers_its_pending_routine_changes_only(is_routine):
    queue = build_queue(debounce_seconds=0.05, has_backpressure=True)
    queue.add_debounced("a", routine=True)
    if not is_routine:
        queue.add_debounced("a")
    queue.defer("a")
    key = asyncio.wait_for(queue.get(), 0.4)
    if is_routine:
        with pytest.raises(TimeoutError):
            await key
    else:
        assert (await key)[::2] == ("a", False)


async def test_important_change_shortens_the_debounce_of_a_routine_one():
    queue = build_queue(debounce_seconds=0.1, has_backpressure=True)
    queue.add_debounced("a", routine=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.3)
    queue.add_debounced("a")
    assert (await asyncio.wait_for(queue.get(), 0.2))[0] == "a"


async def test_important_change_queues_a_deferred_key(loaded):
    queue, load = loaded
    queue.defer("a")
    queue.add("a")
    key, _, is_due = await asyncio.wait_for(queue.get(), 0.1)
    assert (key, is_due) == ("a", False)
    queue.defer("a")
    queue.done("a")
    load.clear()
    assert (await asyncio.wait_for(queue.get(), 1))[::2] == ("a", True)
