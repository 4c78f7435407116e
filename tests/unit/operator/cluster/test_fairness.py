"""One namespace with very many keys, Jobs, Events or attempts beside another with one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.cluster import recorder
from sailvl_operator.cluster.backpressure import HIGH_BACKLOG_JOBS, StartupBacklog
from sailvl_operator.cluster.fair_queue import FairQueue
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics
from sailvl_operator.cluster.workqueue import QueueConfig, WorkQueue
from tests.support.builders.operator import build_job, build_run

Key = tuple[str, str]
NOW = 1_000_000.0
CROWD = [("big", f"run-{number}") for number in range(10_000)]
HONEST = ("small", "run")


def build_queue(*, is_loaded: Callable[[str], bool] = lambda _: False, **config: float) -> WorkQueue[Key]:
    return WorkQueue(
        QueueConfig(debounce_seconds=0.0, **config),
        group_by=lambda key: key[0],
        has_backpressure=lambda key: is_loaded(key[0]),
    )


async def take(queue: WorkQueue[Key], number: int) -> list[Key]:
    """Take some keys as one worker, and release each."""
    keys = []
    for _ in range(number):
        key, _, _ = await asyncio.wait_for(queue.get(), 1)
        queue.done(key)
        keys.append(key)
    return keys


async def test_key_waits_for_one_key_of_each_other_namespace():
    queue = build_queue()
    for key in (*CROWD, HONEST):
        queue.add(key)
    assert await take(queue, 2) == [CROWD[0], HONEST]
    assert await take(queue, 2) == CROWD[1:3]


async def test_keys_of_one_namespace_keep_their_order():
    queue = build_queue()
    for key in CROWD[:5]:
        queue.add(key)
    assert await take(queue, 5) == CROWD[:5]


async def test_keys_of_others_do_not_defer_a_write():
    queue = build_queue(is_loaded=lambda namespace: namespace == "big")
    for key in CROWD:
        queue.add(key)
    assert not queue.has_backlog(HONEST)
    assert queue.has_backlog(CROWD[0])


async def test_deferred_key_does_not_wait_for_the_keys_of_others():
    queue = build_queue(is_loaded=lambda namespace: namespace == "big")
    queue.defer(HONEST)
    queue.defer(CROWD[0])
    for key in CROWD[1:]:
        queue.add(key)
    await asyncio.sleep(0.6)  # until deferred keys are checked
    assert HONEST in await take(queue, 2)


async def test_overdue_keys_do_not_stand_before_a_key_of_another_namespace():
    queue = build_queue(is_loaded=lambda namespace: namespace == "big", max_defer_seconds=0.0)
    for key in CROWD:
        queue.defer(key)
    queue.add(HONEST)
    assert HONEST in await take(queue, 2)


@pytest.mark.parametrize("namespaces", [1, 2, 3])
async def test_slow_keys_of_other_namespaces_leave_a_worker(namespaces):
    queue = build_queue()
    queue.start(16)
    for number in range(100 * namespaces):
        queue.add((f"slow-{number % namespaces}", str(number)))
    workers = [asyncio.create_task(queue.get()) for _ in range(16)]
    await asyncio.sleep(0)
    queue.add(HONEST)
    for _ in range(3):
        await asyncio.sleep(0)
    held_keys = [worker.result()[0] for worker in workers if worker.done()]
    assert HONEST in held_keys
    assert len(held_keys) > 10, "others use most of the workers"
    for worker in workers:
        worker.cancel()


async def test_waiting_worker_takes_a_key_of_a_namespace_once_another_is_done():
    queue = build_queue()
    queue.start(4)
    for key in CROWD[:4]:
        queue.add(key)
    assert [(await queue.get())[0] for _ in range(3)] == CROWD[:3]
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.done(CROWD[0])
    assert (await asyncio.wait_for(waiting, 1))[0] == CROWD[3]


async def test_queue_is_stalled_only_if_no_worker_takes_any_key():
    times = [0.0]
    queue: WorkQueue[Key] = WorkQueue(QueueConfig(), group_by=lambda key: key[0], monotonic=lambda: times[0])
    assert queue.stalled_seconds() == 0.0
    for key in CROWD[:3]:
        queue.add(key)
    times[0] = 400.0
    assert queue.stalled_seconds() == 400.0
    await queue.get()
    assert (queue.stalled_seconds(), queue.oldest_seconds()) == (0.0, 400.0)
    times[0] = 500.0
    assert queue.stalled_seconds() == 100.0
    await queue.get()
    await queue.get()
    assert queue.stalled_seconds() == 0.0


class JobsWithoutPods:
    """Jobs without pods, in place of `OwnedObjects`."""

    def __init__(self, namespaces: dict[str, int]) -> None:
        job = build_job("curate", nodes=2, created=NOW - 5)
        self.jobs = [
            replace(job, namespace=ns, run=f"run-{n}", uid=f"{ns}-{n}")
            for ns, c in namespaces.items()
            for n in range(c)
        ]
        self.pods = self

    def get(self, _: Key) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("namespaces", "loaded"),
    [
        pytest.param({"big": 1000, "small": 1}, {"big"}, id="one tenant's Jobs"),
        pytest.param({"a": 40, "b": 40, "idle": 0}, {"a", "b"}, id="all alike"),
        pytest.param({"big": HIGH_BACKLOG_JOBS - 1, "small": 1}, set(), id="few"),
    ],
)
def test_backpressure_concerns_the_namespaces_that_cause_it(namespaces, loaded):
    backlog = StartupBacklog(JobsWithoutPods(namespaces), clock=lambda: NOW)  # type: ignore[arg-type]
    assert {namespace for namespace in namespaces if backlog.is_high(namespace)} == loaded


class EventSink:
    """Collects the runs of posted Events, in place of a client."""

    def __init__(self) -> None:
        self.posted: list[Key] = []

    async def create(self, _: object, namespace: str, event: dict[str, Any], **__: object) -> None:
        self.posted.append((namespace, event["involvedObject"]["name"]))


async def record_and_post(monkeypatch: pytest.MonkeyPatch, keys: list[Key], limit: int) -> tuple[list[Key], list[str]]:
    """Record an Event on each run, and return the runs whose Events were posted and the counted outcomes."""
    monkeypatch.setattr(recorder, "_QUEUE_LIMIT", limit)
    monkeypatch.setattr(recorder, "_PAUSE_SECONDS", 0.0)
    sink, outcomes = EventSink(), []
    posting = Recorder(sink, identity="x", enabled=True, count=outcomes.append, clock=lambda: NOW)  # type: ignore[arg-type]
    for namespace, name in keys:
        run = msgspec.structs.replace(build_run(), namespace=namespace, name=name, uid=name)
        posting.record(run, type_="Normal", reason="Test", message="m")
    task = asyncio.create_task(posting.run())
    async with asyncio.timeout(5):
        while len(outcomes) < len(keys):
            await asyncio.sleep(0.001)
    task.cancel()
    return sink.posted, outcomes


async def test_namespaces_take_turns_in_posting_events(monkeypatch):
    posted, _ = await record_and_post(monkeypatch, [*CROWD[:20], HONEST], 100)
    assert posted == [CROWD[0], HONEST, *CROWD[1:20]]


async def test_full_queue_of_events_drops_those_of_the_largest_namespace(monkeypatch):
    posted, outcomes = await record_and_post(monkeypatch, [*CROWD[:20], HONEST], 10)
    assert HONEST in posted
    assert (outcomes.count("written"), outcomes.count("dropped")) == (10, 11)


async def test_every_namespace_is_diagnosed_in_turn():
    """Twenty namespaces have many attempts that wait and one has a single one; each round has eight reads."""
    job = build_job("curate", is_suspended=True)
    jobs = [replace(job, namespace=f"big-{n}", run=f"r{m}", uid=f"{n}-{m}") for n in range(20) for m in range(50)]
    jobs.append(replace(job, namespace="small", uid="small"))
    times, read = [0.0], []

    async def read_workload(job):
        read.append(job.namespace)
        return ""

    diagnostics = StartDiagnostics(
        None,  # type: ignore[arg-type]
        interval_seconds=1.0,
        find_attempts=lambda: [(job, ()) for job in jobs],
        on_change=lambda _: None,
        delay_seconds=0.0,
        monotonic=lambda: times[0],
    )
    diagnostics._read_workload = read_workload  # type: ignore[method-assign]
    for _ in range(9):
        times[0] += 5.0
        await diagnostics.diagnose_waiting()
    counts = {namespace: read.count(namespace) for namespace in {job.namespace for job in jobs}}
    assert set(counts.values()) <= {3, 4}
    assert len(read) == 72


def test_items_can_be_removed_from_any_place():
    queue: FairQueue[Key, int] = FairQueue(lambda key: key[0])
    for number, key in enumerate([("a", "1"), ("a", "2"), ("b", "1")]):
        queue.add(key, number)
    assert (queue.remove(("a", "1")), queue.remove(("a", "1")), queue.remove(("c", "1"))) == (0, None, None)
    assert [queue.pop() for _ in range(len(queue))] == [(("a", "2"), 1), (("b", "1"), 2)]
    with pytest.raises(KeyError):
        queue.pop()
