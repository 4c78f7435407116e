"""Audit of a silent watch of runs: missed events are found, replayed, and reported as staleness."""

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
from sailvl_operator.handlers import handle_run_event
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.builders.operator import build_document

KEY = ("team", "demo")


class AuditedStore:
    """A store whose watch delivers only what a test passes to `send_event`."""

    def __init__(self, api: FakeApiServer, client: Client) -> None:
        self.api, self.runs, self.missed, self.now = api, RunStore(), 0, 0.0
        self.queue: WorkQueue[tuple[str, str]] = WorkQueue()
        self.auditor = WatchAuditor(
            client,
            self.runs,
            namespaces=(),
            interval_seconds=60,
            on_event=self.send_event,
            count=self._count,
            monotonic=lambda: self.now,
        )

    def _count(self) -> None:
        self.missed += 1

    def send_event(self, type_: str, raw: dict[str, Any]) -> None:
        handle_run_event(type_, copy.deepcopy(raw), self.runs, self.queue)

    async def audit(self, rounds: int = 1) -> None:
        """Audit in rounds that are a minute apart."""
        for _ in range(rounds):
            self.now += 60
            await self.auditor.check_once()


@pytest.fixture
async def store() -> AsyncIterator[AuditedStore]:
    api = FakeApiServer()
    async with (
        serve(api) as url,
        Client(Credentials(AnonymousConfiguration(url))) as client,
    ):
        yield AuditedStore(api, client)


async def test_missed_creation_is_replayed_after_two_rounds(store: AuditedStore) -> None:
    store.api.put("sailvlruns", build_document())
    await store.audit()
    assert store.runs.get(KEY) is None, "the watch may still deliver the event"
    await store.audit()
    assert store.runs.get(KEY) is not None
    assert (store.missed, store.queue.depth()) == (1, 1)


async def test_missed_change_is_replayed(store: AuditedStore) -> None:
    store.send_event("ADDED", store.api.put("sailvlruns", build_document()))
    store.api.put("sailvlruns", build_document(suspend=True))
    await store.audit(rounds=2)
    entry = store.runs.get(KEY)
    assert entry is not None
    assert entry.run.resource_version == store.api.objects["sailvlruns"][KEY]["metadata"]["resourceVersion"]


async def test_missed_deletion_is_replayed(store: AuditedStore) -> None:
    store.send_event("ADDED", store.api.put("sailvlruns", build_document()))
    await store.audit()
    store.api.remove_named("sailvlruns", "demo")
    await store.audit(rounds=2)
    assert store.runs.get(KEY) is None


async def test_complete_watch_is_neither_replayed_nor_stale(store: AuditedStore) -> None:
    store.send_event("ADDED", store.api.put("sailvlruns", build_document()))
    await store.audit(rounds=3)
    assert (store.missed, store.auditor.stale_seconds()) == (0, 0.0)


async def test_watch_is_stale_until_two_clean_rounds(store: AuditedStore) -> None:
    for number in range(6):
        store.api.put("sailvlruns", build_document(seed=number))
        await store.audit()
    assert store.auditor.stale_seconds() == 240.0, "stale since the second round, although each event was replayed"
    await store.audit(rounds=4)
    assert store.auditor.stale_seconds() == 0.0
