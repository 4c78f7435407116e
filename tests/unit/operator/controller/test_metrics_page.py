"""/metrics while it is large, while it is slow, and with statuses that no operator wrote."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sailvl_operator import health
from sailvl_operator.api.status import Status, decode_status
from sailvl_operator.health import MAX_SCRAPES, HealthServer
from sailvl_operator.metrics_page import MetricsPage
from sailvl_operator.run_series import MAX_LABEL_LENGTH, MAX_SERIES, RunCollector, RunStatus
from sailvl_operator.settings import HealthSettings


class BlockingCollector(Collector):
    """Collector whose rendering takes until the test lets it continue."""

    def __init__(self) -> None:
        self.renderings = 0
        self.has_begun, self.may_continue = threading.Event(), threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.renderings += 1
        self.has_begun.set()
        self.may_continue.wait(10)
        yield GaugeMetricFamily("renderings", "Number of renderings.", value=self.renderings)


def build_status(*, stages: int = 1, metrics: int = 1, state: str = "Running") -> dict[str, Any]:
    values = {f"m{number}": "1.5" for number in range(metrics)}
    return {"stages": [{"name": f"s{n}", "state": state, "attempt": 1, "metrics": values} for n in range(stages)]}


def describe(namespace: str, run: str, status: dict[str, Any]) -> RunStatus:
    return namespace, run, partial(decode_status, status)


def render(*runs: RunStatus, max_series: int = 1000) -> str:
    registry = CollectorRegistry()
    registry.register(RunCollector(lambda: runs, max_series=max_series))
    return generate_latest(registry).decode()


def list_series(page: str, metric: str, **labels: str) -> list[str]:
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    return [line for line in page.splitlines() if line.startswith(metric + "{") and all(w in line for w in wanted)]


@pytest.fixture
def slow() -> Iterator[tuple[BlockingCollector, MetricsPage]]:
    collector, registry = BlockingCollector(), CollectorRegistry()
    page = MetricsPage(registry, take_snapshot=lambda: None)
    registry._collector_to_names[collector] = []  # registering it would collect once
    yield collector, page
    collector.may_continue.set()


async def test_probes_answer_while_a_page_is_rendered(slow):
    collector, page = slow
    settings = HealthSettings(host="127.0.0.1", port=0)
    async with (
        HealthServer(settings, page, operator_page=page, liveness=list, readiness=list) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", timeout=aiohttp.ClientTimeout(5)) as session,
    ):
        scrape = asyncio.create_task(session.get("/metrics"))
        await asyncio.to_thread(collector.has_begun.wait, 5)
        for path in ("/healthz", "/readyz"):
            async with session.get(path) as response:
                assert response.status == 200
        assert not scrape.done()
        collector.may_continue.set()
        async with await scrape as response:
            assert "renderings 1.0" in await response.text()


async def test_requests_beyond_the_limit_are_refused_and_probes_still_answer(slow):
    collector, page = slow
    settings = HealthSettings(host="127.0.0.1", port=0)
    async with (
        HealthServer(settings, page, operator_page=page, liveness=list, readiness=list) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", timeout=aiohttp.ClientTimeout(5)) as session,
    ):
        scrapes = [asyncio.create_task(session.get("/metrics")) for _ in range(MAX_SCRAPES + 3)]
        await asyncio.wait(scrapes, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        async with session.get("/healthz") as response:
            assert response.status == 200
        collector.may_continue.set()
        statuses = [response.status for response in await asyncio.gather(*scrapes)]
        assert (statuses.count(200), statuses.count(503)) == (MAX_SCRAPES, 3)


class LargePage(MetricsPage):
    """Page that no socket buffers hold."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry(), take_snapshot=lambda: None)

    async def read(self) -> bytes:
        return bytes(64 * 2**20)


async def test_client_that_does_not_read_the_page_is_disconnected(monkeypatch):
    monkeypatch.setattr(health, "MAX_SCRAPE_SECONDS", 0.1)
    settings = HealthSettings(host="127.0.0.1", port=0)
    async with HealthServer(settings, LargePage(), operator_page=LargePage(), liveness=list, readiness=list) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            assert await reader.read(8) == b"HTTP/1.1"
            while server._scrapes:
                await asyncio.sleep(0.01)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_concurrent_scrapes_share_one_rendering(slow):
    collector, page = slow
    scrapes = [asyncio.create_task(page.read()) for _ in range(50)]
    await asyncio.to_thread(collector.has_begun.wait, 5)
    collector.may_continue.set()
    assert len(set(await asyncio.gather(*scrapes))) == 1
    assert collector.renderings == 1


async def test_scrapes_for_some_metrics_share_the_page_of_all():
    snapshots = []
    page = MetricsPage(CollectorRegistry(), take_snapshot=lambda: snapshots.append(1))
    settings = HealthSettings(host="127.0.0.1", port=0)
    async with (
        HealthServer(settings, page, operator_page=page, liveness=list, readiness=list) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", timeout=aiohttp.ClientTimeout(5)) as session,
    ):
        for query in ("?name[]=a", "?name[]=b&name[]=c", ""):
            async with session.get(f"/metrics{query}") as response:
                assert response.status == 200
    assert snapshots == [1]


async def test_page_has_the_series_of_all_registries():
    registries = [CollectorRegistry(), CollectorRegistry()]
    for number, registry in enumerate(registries):
        Gauge(f"sailvl_test_{number}", "A gauge.", registry=registry).set(number)
    page = await MetricsPage(*registries, take_snapshot=lambda: None).read()
    assert [line for line in page.decode().splitlines() if not line.startswith("#")] == [
        "sailvl_test_0 0.0",
        "sailvl_test_1 1.0",
    ]


async def test_scrape_that_is_cancelled_does_not_end_the_rendering_of_others(slow):
    collector, page = slow
    first, second = asyncio.create_task(page.read()), asyncio.create_task(page.read())
    await asyncio.to_thread(collector.has_begun.wait, 5)
    first.cancel()
    collector.may_continue.set()
    assert b"renderings 1.0" in await second


async def test_page_is_reused_for_a_multiple_of_its_rendering_time():
    times = iter([0.0, 0.0, 2.0, 19.9, 20.0, 20.0, 20.1, 21.0])
    registry, snapshots = CollectorRegistry(), []
    page = MetricsPage(registry, take_snapshot=lambda: snapshots.append(1), monotonic=lambda: next(times))
    for expected in (1, 1, 2, 2):
        await page.read()
        assert len(snapshots) == expected


async def test_event_loop_only_copies_references_for_a_large_page():
    """Rendering 8 runs with 32 stages of 64 metrics takes more than 100 milliseconds of CPU time."""
    runs = [describe("team", f"r{n}", build_status(stages=32, metrics=64)) for n in range(8)]
    collector, registry = RunCollector(lambda: runs), CollectorRegistry()
    registry._collector_to_names[collector] = []
    page = MetricsPage(registry, take_snapshot=collector.take_snapshot)
    gc.collect()
    gc.disable()  # a collection of all tests' objects could run in this thread
    try:
        before = time.thread_time()
        text = await page.read()
        assert time.thread_time() - before < 0.05
    finally:
        gc.enable()
    assert len(list_series(text.decode(), "sailvl_run_stage_metric")) == 8 * 32 * 64 <= MAX_SERIES


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"stages": [{"name": "s", "state": "Running", "metrics": {"loss": "abc"}}]}, id="number"),
        pytest.param({"stages": [{"name": "s", "state": "Running", "startTime": "soon"}]}, id="time"),
        pytest.param({"goodput": {"cost": "much"}}, id="cost"),
        pytest.param({"stages": "all"}, id="type"),
        pytest.param({"stages": [{"name": "s", "state": "Dancing"}]}, id="state"),
        pytest.param({"stages": [{"name": "s", "state": "Running", "attempt": 10**400}]}, id="huge number"),
    ],
)
def test_run_with_an_unreadable_status_loses_only_its_own_series(status):
    page = render(describe("evil", "r", status), describe("team", "demo", build_status()))
    assert list_series(page, "sailvl_run_stage_state", namespace="team")
    assert 'namespace="evil"' not in page
    assert "sailvl_operator_unreadable_runs 1.0" in page
    assert 'sailvl_runs{state="pending"} 1.0' in page


def test_labels_are_cut_and_can_be_encoded():
    status = build_status()
    status["stages"][0]["metrics"] = {"\ud800" + "x" * 100_000: "1", 'a"\n': "2"}
    [long, quoted] = list_series(render(describe("team", "demo", status)), "sailvl_run_stage_metric")
    assert 'metric="?' + "x" * (MAX_LABEL_LENGTH - 1) + '"' in long
    assert 'metric="a\\"\\n"' in quoted


def test_namespaces_share_the_limit_of_series_fairly():
    runs = [describe("big", f"r{n}", build_status(stages=2, metrics=20)) for n in range(10)]
    runs += [describe("small", "r", build_status(metrics=30)), describe("tiny", "r", build_status(metrics=1))]
    page = render(*runs, max_series=100)
    found = {ns: len(list_series(page, "sailvl_run_stage_metric", namespace=ns)) for ns in ("big", "small", "tiny")}
    assert found == {"big": 69, "small": 30, "tiny": 1}
    assert 'sailvl_operator_omitted_series{metric="sailvl_run_stage_metric"} 331.0' in page
    assert 'metric="sailvl_run_stage_state"' not in page


def test_series_of_finished_runs_are_left_out_first():
    finished = build_status(metrics=10, state="Succeeded")
    condition = {"type": "Succeeded", "status": "True", "reason": "Completed", "message": ""}
    finished["conditions"] = [condition | {"lastTransitionTime": "", "observedGeneration": 1}]
    runs = [describe("team", "old", finished), describe("team", "new", build_status(metrics=10))]
    page = render(*runs, max_series=12)
    assert len(list_series(page, "sailvl_run_stage_metric", run="new")) == 10
    assert len(list_series(page, "sailvl_run_stage_metric", run="old")) == 2


def test_collector_without_a_snapshot_reads_the_statuses_itself():
    assert 'run="demo"' in render(("team", "demo", lambda: Status(stages=[*decode_status(build_status()).stages])))
