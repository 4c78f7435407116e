"""When keys are looked at: groups of changes, failures beside timers, the beginning."""

from __future__ import annotations

import asyncio

import pytest

from sailvl_operator.cluster.workqueue import WorkQueue


async def test_a_failure_doesn_t_put_a_timer_off():
    queue = WorkQueue[str](backoff_seconds=5, backoff_limit_seconds=5)
    queue.add_after("a", 0.02)
    queue.retry("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.done("a")


async def test_what_came_before_the_workers_has_not_waited_for_them():
    queue = WorkQueue[str](backoff_seconds=1, backoff_limit_seconds=1)
    queue.add("a")
    await asyncio.sleep(0.05)
    queue.start()
    assert queue.oldest_seconds() < 0.05


async def test_what_changes_together_is_looked_at_once():
    queue = WorkQueue[str](backoff_seconds=1, backoff_limit_seconds=1, debounce_seconds=0.3)
    for _ in range(3):
        queue.add_debounced("a")
        await asyncio.sleep(0.01)
    assert queue.depth() == 0
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
    queue.add_debounced("a")
    queue.done("a")
    assert (await asyncio.wait_for(queue.get(), 1))[0] == "a", "a change while it was looked at"
    queue.done("a")
    queue.add_debounced("a")
    queue.add("a")
    await queue.get()
    queue.done("a")
    await asyncio.sleep(0.5)
    assert queue.depth() == 0, "gathered changes went with the look that came first"


@pytest.fixture
def held():
    """A queue that holds those put off for as long as the list isn't empty."""
    holds = ["rush"]
    return WorkQueue[str](
        backoff_seconds=1, backoff_limit_seconds=1, max_defer_seconds=2.0, has_backpressure=lambda: bool(holds)
    ), holds


async def test_those_put_off_wait_while_they_are_held_and_then_go_together(held):
    queue, holds = held
    for key in "abc":
        queue.defer(key)
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0.7)
    assert not any(worker.done() for worker in workers)
    holds.clear()
    found = await asyncio.wait_for(asyncio.gather(*workers), 1)
    assert sorted((key, is_due) for key, _, is_due in found) == [("a", True), ("b", True), ("c", True)]


async def test_those_put_off_are_held_for_so_long_at_most(held):
    queue, _ = held
    queue.defer("a")
    _, waited, is_due = await asyncio.wait_for(queue.get(), 3.5)
    assert is_due
    assert waited > 2.0


async def test_calm_changes_of_a_key_that_is_put_off_are_told_of_in_its_turn(held):
    queue, holds = held
    queue.defer("a")
    queue.add_debounced("a", routine=True)
    queue.add_debounced("b", routine=True)
    assert (await asyncio.wait_for(queue.get(), 0.1))[0] == "b"
    holds.clear()
    assert (await asyncio.wait_for(queue.get(), 1))[::2] == ("a", True)


@pytest.mark.parametrize("is_told_of_all", [True, False])
async def test_a_key_that_is_put_off_is_looked_at_again_only_if_something_has_to_be_done(is_told_of_all):
    queue = WorkQueue[str](
        backoff_seconds=1, backoff_limit_seconds=1, debounce_seconds=0.05, has_backpressure=lambda: True
    )
    queue.add_debounced("a", routine=True)
    if not is_told_of_all:
        queue.add_debounced("a")
    queue.defer("a")
    looked = asyncio.wait_for(queue.get(), 0.4)
    if is_told_of_all:
        with pytest.raises(TimeoutError):
            await looked
    else:
        assert (await looked)[::2] == ("a", False)


async def test_what_has_to_be_looked_at_doesn_t_wait_with_calm_changes():
    queue = WorkQueue[str](
        backoff_seconds=1, backoff_limit_seconds=1, debounce_seconds=0.1, has_backpressure=lambda: True
    )
    queue.add_debounced("a", routine=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.3)
    queue.add_debounced("a")
    assert (await asyncio.wait_for(queue.get(), 0.2))[0] == "a"


async def test_what_happens_to_a_key_that_is_put_off_is_looked_at(held):
    queue, holds = held
    queue.defer("a")
    queue.add("a")
    key, _, is_due = await asyncio.wait_for(queue.get(), 0.1)
    assert (key, is_due) == ("a", False)
    queue.defer("a")
    queue.done("a")
    holds.clear()
    assert (await asyncio.wait_for(queue.get(), 1))[::2] == ("a", True)
