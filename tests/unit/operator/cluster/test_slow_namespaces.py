"""One namespace whose requests are slow, refused or deferred beside another: the other's are not delayed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.cluster import recorder
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.errors import TooManyRequests
from tests.support.builders.operator import build_job, build_pod, build_run

Posted = list[tuple[str, str]]


async def wait_until(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def hang() -> None:
    await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def run_task(run: Callable[[], Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Events:
    """A recorder whose Events in the namespace `slow` are answered as `answer` does."""

    def __init__(
        self, answer: Callable[[], Any] = hang, has_backpressure: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.posted: Posted = []
        self.outcomes: Counter[str] = Counter()
        self._answer = answer
        self.recorder = Recorder(
            SimpleNamespace(create=self._create),  # type: ignore[arg-type]
            identity="i",
            enabled=True,
            count=lambda outcome: self.outcomes.update([outcome]),
            clock=lambda: 1e9,
            has_backpressure=has_backpressure,
        )

    async def _create(self, _: object, namespace: str, event: dict[str, Any], **__: object) -> None:
        if namespace == "slow":
            await self._answer()
        self.posted.append((namespace, event["message"]))

    def record(self, namespace: str, *messages: str) -> None:
        run = msgspec.structs.replace(build_run(), namespace=namespace, uid=namespace)
        for message in messages:
            self.recorder.record(run, type_="Normal", reason="R", message=message)


async def answer_at_once() -> None:
    pass


async def refuse() -> None:
    await asyncio.sleep(0.5)  # in which the client has tried again
    raise TooManyRequests("429", status=429)


@pytest.mark.parametrize("answer", [hang, refuse], ids=["never answered", "429"])
async def test_events_of_a_slow_namespace_do_not_delay_those_of_others(answer):
    events = Events(answer)
    events.record("slow", *map(str, range(1000)))
    async with run_task(events.recorder.run):
        await asyncio.sleep(0)
        events.record("other", "a", "b", "c")
        await wait_until(lambda: len(events.posted) == 3, seconds=1)
    assert events.posted == [("other", "a"), ("other", "b"), ("other", "c")]


async def test_event_that_is_never_answered_is_given_up(monkeypatch):
    monkeypatch.setattr(recorder, "_POST_TIMEOUT_SECONDS", 0.01)
    events = Events()
    events.record("slow", "a", "b")
    async with run_task(events.recorder.run):
        await wait_until(lambda: events.outcomes["failed"] == 2)


async def test_namespace_with_too_many_events_loses_its_oldest(monkeypatch):
    monkeypatch.setattr(recorder, "_NAMESPACE_QUEUE_LIMIT", 3)
    events = Events(answer_at_once)
    events.record("slow", *map(str, range(10)))
    events.record("other", "a", "b", "c")
    async with run_task(events.recorder.run):
        await wait_until(lambda: len(events.posted) == 6)
    assert [message for namespace, message in events.posted if namespace == "slow"] == ["7", "8", "9"]
    assert events.outcomes == {"written": 6, "dropped": 7}


async def test_events_under_backpressure_do_not_delay_those_of_others(monkeypatch):
    monkeypatch.setattr(recorder, "_BACKPRESSURE_PAUSE_SECONDS", 60.0)
    events = Events(answer_at_once, has_backpressure=lambda namespace: namespace == "slow")
    events.record("slow", *map(str, range(100)))
    events.record("other", *map(str, range(10)))
    async with run_task(events.recorder.run):
        await wait_until(lambda: len(events.posted) == 11, seconds=1)
    assert Counter(namespace for namespace, _ in events.posted) == {"other": 10, "slow": 1}


async def test_slow_reads_of_a_namespace_do_not_delay_the_diagnoses_of_others():
    job = build_job("curate", is_suspended=True)
    jobs = [replace(job, namespace="slow", run=f"r{n}", uid=f"slow-{n}") for n in range(50)]
    jobs.append(replace(job, namespace="other", uid="other"))
    changed: list[tuple[str, str]] = []

    async def list_pages(_: object, namespace: str, **__: object) -> AsyncIterator[Any]:
        if namespace == "slow":
            await hang()
        conditions = [{"type": "QuotaReserved", "status": "False", "message": "no quota"}]
        yield SimpleNamespace(items=[{"status": {"conditions": conditions}}])

    diagnostics = StartDiagnostics(
        SimpleNamespace(list_pages=list_pages),  # type: ignore[arg-type]
        interval_seconds=0.01,
        find_attempts=lambda: [(job, ()) for job in jobs],
        on_change=changed.append,
        delay_seconds=0.0,
    )
    async with run_task(diagnostics.run):
        await wait_until(lambda: bool(changed), seconds=1)
    assert changed == [("other", "demo")]


class UnansweringWorkers:
    """Workers in place of an HTTP session: those of 192.0.2.1 never answer, others at once."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()

    @asynccontextmanager
    async def get(self, url: str, **_: object) -> AsyncIterator[SimpleNamespace]:
        address = url.split("/")[2].partition(":")[0]
        self.reads[address] += 1
        if address == "192.0.2.1":
            await hang()
        yield SimpleNamespace(status=200, content=SimpleNamespace(iter_any=self._stream))

    async def _stream(self) -> AsyncIterator[bytes]:
        yield b'{"attempt":1,"phase":"running"}'


def build_pods(namespace: str, count: int, ip: str) -> list[PodRecord]:
    pod = replace(build_pod("curate", ip=ip), namespace=namespace, run_uid="u")
    return [replace(pod, uid=f"{namespace}-{n}", name=f"r{n}-curate-1-0", run=f"r{n}") for n in range(count)]


def build_reader(pods: list[PodRecord], interval_seconds: float = 5.0, **options: Any) -> ProgressReader:
    return ProgressReader(
        interval_seconds=interval_seconds,
        pods=lambda: pods,
        on_change=lambda _: None,
        count=lambda _: None,
        **options,
    )


async def test_slow_workers_of_a_namespace_leave_slots_for_those_of_others(monkeypatch):
    workers, pods = UnansweringWorkers(), build_pods("slow", 1000, "192.0.2.1")
    reader = build_reader(pods, interval_seconds=0.01)
    monkeypatch.setattr(reader, "build_session", lambda: SessionContext(workers))
    async with run_task(reader.run):
        await wait_until(lambda: workers.reads["192.0.2.1"] == 8)
        for _ in range(100):
            await asyncio.sleep(0.001)
        pods += build_pods("other", 1, "192.0.2.2")
        await wait_until(lambda: workers.reads["192.0.2.2"] > 0, seconds=1)
    assert workers.reads["192.0.2.1"] == 8


class SessionContext:
    """Yields workers in place of a session."""

    def __init__(self, workers: UnansweringWorkers) -> None:
        self._workers = workers

    async def __aenter__(self) -> UnansweringWorkers:
        return self._workers

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_backpressure_of_a_namespace_slows_the_reads_of_no_other():
    workers, pods = UnansweringWorkers(), build_pods("loaded", 100, "192.0.2.3") + build_pods("other", 30, "192.0.2.2")
    reader = build_reader(pods, has_backpressure=lambda namespace: namespace == "loaded")
    await reader.read_due(workers)  # type: ignore[arg-type]
    assert workers.reads == {"192.0.2.2": 30, "192.0.2.3": 12}
