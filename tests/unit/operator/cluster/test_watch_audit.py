"""A watch of runs that fell silent: what it missed is found by listing, made up for, and shown by the probe."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.runs import RunStore
from sailvl_operator.cluster.watch_audit import WatchAuditor
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.controller import handle_run_event
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.builders.operator import build_document

KEY = ("team", "demo")


class Deaf:
    """An operator whose watch says only what a test lets through."""

    def __init__(self, api: FakeApiServer, client: Client) -> None:
        self.api, self.runs, self.missed, self.now = api, RunStore(), 0, 0.0
        self.queue: WorkQueue[tuple[str, str]] = WorkQueue(backoff_seconds=1, backoff_limit_seconds=1)
        self.resync = WatchAuditor(
            client,
            self.runs,
            namespaces=(),
            interval=60,
            tell=self.see,
            count=self._count,
            monotonic=lambda: self.now,
        )

    def _count(self) -> None:
        self.missed += 1

    def see(self, type_: str, raw: dict[str, Any]) -> None:
        handle_run_event(type_, copy.deepcopy(raw), self.runs, self.queue)

    async def look(self) -> None:
        self.now += 60
        await self.resync.look()


@pytest.fixture
async def deaf() -> AsyncIterator[Deaf]:
    api = FakeApiServer()
    async with (
        serve(api) as url,
        Client(Credentials(AnonymousConfiguration(url))) as client,
    ):
        yield Deaf(api, client)


async def test_a_run_that_was_never_told_of(deaf: Deaf) -> None:
    deaf.api.put("sailvlruns", build_document())
    await deaf.look()
    assert deaf.runs.get(KEY) is None, "the watch has a round's time to tell"
    await deaf.look()
    assert deaf.runs.get(KEY) is not None
    assert (deaf.missed, deaf.queue.depth()) == (1, 1)


async def test_a_change_that_was_never_told_of(deaf: Deaf) -> None:
    deaf.see("ADDED", deaf.api.put("sailvlruns", build_document()))
    deaf.api.put("sailvlruns", build_document(suspend=True))
    for _ in range(2):
        await deaf.look()
    entry = deaf.runs.get(KEY)
    assert entry is not None
    assert entry.run.resource_version == deaf.api.objects["sailvlruns"][KEY]["metadata"]["resourceVersion"]


async def test_a_deletion_that_was_never_told_of(deaf: Deaf) -> None:
    deaf.see("ADDED", deaf.api.put("sailvlruns", build_document()))
    await deaf.look()
    deaf.api.remove_named("sailvlruns", "demo")
    await deaf.look()
    await deaf.look()
    assert deaf.runs.get(KEY) is None


async def test_a_watch_that_tells_all_is_left_alone(deaf: Deaf) -> None:
    deaf.see("ADDED", deaf.api.put("sailvlruns", build_document()))
    for _ in range(3):
        await deaf.look()
    assert (deaf.missed, deaf.resync.stale_seconds()) == (0, 0.0)


async def test_deafness_lasts_until_two_rounds_miss_nothing(deaf: Deaf) -> None:
    for number in range(6):
        deaf.api.put("sailvlruns", build_document(seed=number))
        await deaf.look()
    assert deaf.resync.stale_seconds() == 240.0, "missed since the second round, though every other one is made up for"
    for _ in range(4):
        await deaf.look()
    assert deaf.resync.stale_seconds() == 0.0
