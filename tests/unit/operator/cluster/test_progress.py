"""Reader of /progress against a worker that answers over HTTP."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.core.reports import MAX_METRICS
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import build_pod

KEY = ("team", "demo")


class Worker:
    """Serves /progress as a worker does."""

    def __init__(self) -> None:
        self.document: dict | str = {}
        self.status = 200

    async def answer(self, _: web.Request) -> web.Response:
        if isinstance(self.document, str):
            return web.Response(text=self.document, status=self.status)
        return web.json_response(self.document, status=self.status)


@pytest.fixture
async def reading():
    worker, changes, outcomes, omitted = Worker(), [], [], []
    app = web.Application()
    app.router.add_get("/progress", worker.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        pods = [build_pod("curate", ip="127.0.0.1")]
        reader = ProgressReader(
            interval_seconds=5.0,
            timeout_seconds=10.0,
            pods=lambda: pods,
            on_change=changes.append,
            count=outcomes.append,
            has_backpressure=lambda _: world.has_backpressure,
            port=server.port,
            may_read=lambda ip: True,
            count_omitted=omitted.append,
        )
        async with reader.build_session() as session:
            world = SimpleNamespace(
                has_backpressure=False,
                worker=worker,
                changes=changes,
                outcomes=outcomes,
                omitted=omitted,
                pods=pods,
                reader=reader,
                read=lambda: reader.read_due(session),
            )
            yield world


async def test_only_changed_progress_is_reported(reading):
    for step, at in ((1, 1.0), (1, 2.0), (2, 3.0)):
        reading.worker.document = asdict(Progress(attempt=1, phase="running", step=step, time=at))
        await reading.read()
    assert reading.changes == [KEY, KEY]
    assert reading.reader.get(KEY, "u")["curate", 1].step == 2
    assert reading.reader.get(KEY, "u")["curate", 1].time == 3.0
    reading.reader.forget(KEY, lambda stage, attempt: (stage, attempt) == ("curate", 1))
    assert reading.reader.get(KEY, "u") == {}


async def test_progress_of_an_earlier_run_with_the_same_name_is_ignored(reading):
    reading.worker.document = asdict(Progress(attempt=1, phase="running", step=1))
    reading.pods[:] = [replace(pod, run_uid="old") for pod in reading.pods]
    await reading.read()
    assert reading.reader.get(KEY, "new") == {}
    assert reading.reader.get(KEY, "old")["curate", 1].step == 1
    reading.pods[:] = [replace(pod, run_uid="new") for pod in reading.pods]
    await reading.read()
    assert reading.changes == [KEY, KEY], "the same progress of another run is a change"


async def test_attempt_may_not_report_other_metrics_in_every_answer(reading):
    found = set()
    for answer in range(5):
        metrics = {f"a{answer}-{n}": 1.0 for n in range(MAX_METRICS)}
        reading.worker.document = asdict(Progress(attempt=1, phase="running", step=answer, metrics=metrics))
        await reading.read()
        found.update(reading.reader.get(KEY, "u")["curate", 1].metrics)
    assert len(found) == MAX_METRICS
    assert reading.omitted == [MAX_METRICS] * 4
    reading.reader.forget(KEY, lambda *_: True)
    await reading.read()
    assert len(reading.reader.get(KEY, "u")["curate", 1].metrics) == MAX_METRICS


@pytest.mark.parametrize(
    ("document", "status", "outcome"),
    [
        pytest.param("<html>", 200, "failed", id="not JSON"),
        pytest.param({"attempt": 1, "phase": "running"}, 503, "failed", id="HTTP error"),
        pytest.param("1" * 100_000, 200, "failed", id="too large"),
        pytest.param({"attempt": 7, "phase": "running"}, 200, "ok", id="worker of another attempt at the same address"),
    ],
)
async def test_invalid_answer_is_counted_and_ignored(reading, document, status, outcome):
    reading.worker.document, reading.worker.status = document, status
    await reading.read()
    assert (reading.outcomes, reading.changes, reading.reader.get(KEY, "u")) == ([outcome], [], {})


@pytest.mark.parametrize(
    "fields",
    [{"index": 1}, {"is_gone": True}, {"is_deleting": True}, {"phase": "Pending"}, {"ip": ""}],
    ids=lambda fields: next(iter(fields)),
)
async def test_only_the_first_worker_of_a_running_attempt_is_read(reading, fields):
    reading.pods[:] = [build_pod("curate", **({"ip": "127.0.0.1"} | fields))]
    await reading.read()
    assert reading.outcomes == []


@pytest.mark.parametrize(("has_backpressure", "reads"), [(False, 50), (True, 12)])
async def test_reads_per_round_are_limited_and_fewer_under_backpressure(reading, has_backpressure, reads):
    reading.worker.document = asdict(Progress(attempt=1, phase="running"))
    reading.pods[:] = [replace(build_pod("curate", ip="127.0.0.1"), uid=f"pod-{n}") for n in range(120)]
    reading.has_backpressure = has_backpressure
    await reading.read()
    assert reading.outcomes == ["ok"] * reads


async def test_worker_that_never_answers_is_reported_once(reading):
    reading.reader._monotonic = lambda: next(reading.times)
    reading.times = iter(range(0, 10**6, 100))
    reading.worker.status = 503
    await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}
    assert reading.changes == []
    for _ in range(5):
        await reading.read()
    error = reading.reader.get_errors(KEY, "u")["curate", 1]
    assert error.startswith("port ")
    assert error.endswith("of pod demo-curate-1-0: /progress returned 503")
    assert reading.changes == [KEY]
    reading.worker.document, reading.worker.status = asdict(Progress(attempt=1, phase="running", step=1)), 200
    await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}


async def test_worker_that_answered_before_is_not_reported(reading):
    reading.reader._monotonic = lambda: next(reading.times)
    reading.times = iter(range(0, 10**6, 100))
    reading.worker.document = asdict(Progress(attempt=1, phase="running", step=1))
    await reading.read()
    reading.worker.status = 503
    for _ in range(8):
        await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}
