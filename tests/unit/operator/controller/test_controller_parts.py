"""The small parts around the engine: work queue, stores, merge patches, settings, progress, the server's probes."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Counter

from sailvl_operator.cli.operator import Operator, add_arguments
from sailvl_operator.cluster.merge_patch import build_merge_patch, drop_nulls
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.runs import RunStore
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.errors import SettingsError
from sailvl_operator.health import Server
from sailvl_operator.settings import OPTIONS, HealthServerSettings, ProgressSettings, Settings, describe, read_settings
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import build_document, build_pod

KEY = ("team", "demo")


def make_queue() -> WorkQueue[str]:
    return WorkQueue(backoff_seconds=0.02, backoff_limit_seconds=0.05, jitter=lambda: 1.0)


async def test_a_key_is_queued_once_and_held_by_one_worker():
    queue = make_queue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert queue.depth() == 2
    assert (await queue.get())[0] == "a"
    queue.add("a")
    assert (await queue.get())[0] == "b"
    assert queue.depth() == 0, "a worker holds it"
    queue.done("a")
    queue.done("b")
    assert (await queue.get())[0] == "a", "it changed while it was held"
    assert queue.depth() == 0


async def test_failures_wait_longer_each_time_until_one_success():
    queue = make_queue()
    assert [queue.retry("a") for _ in range(3)] == [0.02, 0.04, 0.05]
    queue.reset_backoff("a")
    assert queue.retry("a") == 0.02
    async with asyncio.timeout(1):
        assert (await queue.get())[0] == "a"


async def test_a_later_timer_takes_the_place_of_an_earlier_one():
    queue = make_queue()
    queue.add_after("a", 0.01)
    queue.add_after("a", 30.0)
    queue.add_after("b", 0.01)
    queue.add_after("c", 0.01)
    queue.cancel_timer("c")
    await asyncio.sleep(0.05)
    assert queue.depth() == 1
    assert 0.0 < queue.oldest_seconds() < 1.0
    queue.cancel_timer("a")


OLD = {"a": 1, "b": {"c": 2, "d": 3}, "list": [{"x": 1}]}


@pytest.mark.parametrize(
    ("new", "patch"),
    [
        pytest.param(OLD, {}, id="nothing changed"),
        pytest.param({"a": 1, "b": {"c": 2, "d": 3}}, {"list": None}, id="a field went"),
        pytest.param(OLD | {"b": {"c": 2}}, {"b": {"d": None}}, id="an inner field went"),
        pytest.param(OLD | {"b": {"c": 5, "d": 3}}, {"b": {"c": 5}}, id="an inner change"),
        pytest.param(OLD | {"list": [{"x": 2}]}, {"list": [{"x": 2}]}, id="a list goes whole"),
        pytest.param(OLD | {"n": {}}, {"n": {}}, id="a new empty field"),
    ],
)
def test_merge_patches(new, patch):
    assert build_merge_patch(OLD, new) == patch


def test_nulls_are_dropped_at_every_depth():
    assert drop_nulls({"a": None, "b": [{"c": None, "d": 0}], "e": {"f": None}}) == {"b": [{"d": 0}], "e": {}}


def make_raw(version: int, uid: str = "u", **spec: object) -> dict:
    metadata = {"uid": uid, "resourceVersion": str(version), "creationTimestamp": "2026-01-01T00:00:00Z"}
    document = build_document(**spec)
    return document | {"metadata": document["metadata"] | metadata}


def test_older_versions_never_replace_newer_ones():
    runs = RunStore()
    assert runs.put(make_raw(10))
    assert not runs.put(make_raw(9))
    assert not runs.put(make_raw(10))
    assert runs.put(make_raw(11))
    runs.delete(KEY, "another")
    assert runs.get(KEY).run.resource_version == "11"
    runs.delete(KEY, "u")
    assert not runs.put_patched(make_raw(12)), "the run was deleted before the answer came"
    assert runs.get(KEY) is None


def test_an_unreadable_run_keeps_its_name_and_says_why():
    runs = RunStore()
    runs.put(make_raw(10, stages="none"))
    entry = runs.get(KEY)
    assert (entry.run.name, entry.run.uid, bool(entry.problem)) == ("demo", "u", True)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def test_flags_win_over_variables_and_variables_over_defaults():
    environment = {
        "SAILVL_OPERATOR_WORKERS": "3",
        "SAILVL_OPERATOR_METRICS_PORT": "9",
        "SAILVL_OPERATOR_NAMESPACES": "a, b",
    }
    settings = read_settings(parse("--workers", "5", "--leader-election", "false", "--trainer-image", "i"), environment)
    assert (settings.queue.workers, settings.server.port, settings.api.namespaces) == (5, 9, ("a", "b"))
    assert (settings.lease.enabled, settings.defaults.image) == (False, "i")
    assert settings.lease.duration == Settings().lease.duration


def test_every_option_fills_a_field():
    described = describe(Settings())
    for option in OPTIONS:
        group, _, name = option.target.rpartition(".")
        assert name in (described[group] if group else described), option.flag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(
            ["--workers", "many"], "--workers (SAILVL_OPERATOR_WORKERS) is 'many'; give a whole number", id="number"
        ),
        pytest.param(["--events", "perhaps"], "give true or false", id="truth"),
        pytest.param(["--lease-duration", "5"], "set it below the duration of 5.0 s", id="lease"),
    ],
)
def test_bad_settings_say_what_to_give_instead(flags, words):
    with pytest.raises(SettingsError) as error:
        read_settings(parse(*flags), {})
    assert words in str(error.value)


class Worker:
    """Serves /progress as a trainer does."""

    def __init__(self) -> None:
        self.document: dict | str = {}
        self.status = 200

    async def answer(self, _: web.Request) -> web.Response:
        if isinstance(self.document, str):
            return web.Response(text=self.document, status=self.status)
        return web.json_response(self.document, status=self.status)


@pytest.fixture
async def reading():
    worker, changes, outcomes, rushes = Worker(), [], [], []
    app = web.Application()
    app.router.add_get("/progress", worker.answer)
    async with TestServer(app, host="127.0.0.1") as server, aiohttp.ClientSession() as session:
        pods = [build_pod("curate", ip="127.0.0.1")]
        reader = ProgressReader(
            ProgressSettings(timeout=0.5),
            pods=lambda: pods,
            on_change=changes.append,
            count=outcomes.append,
            has_backpressure=lambda: bool(rushes),
            port=server.port,
        )
        yield SimpleNamespace(
            rushes=rushes,
            worker=worker,
            changes=changes,
            outcomes=outcomes,
            pods=pods,
            reader=reader,
            read=lambda: reader.read_due(session),
        )


async def test_progress_is_kept_and_only_news_is_reported(reading):
    for step, at in ((1, 1.0), (1, 2.0), (2, 3.0)):
        reading.worker.document = asdict(Progress(attempt=1, phase="running", step=step, time=at))
        await reading.read()
    assert reading.changes == [KEY, KEY]
    assert reading.reader.get(KEY, "u")["curate", 1].step == 2
    assert reading.reader.get(KEY, "u")["curate", 1].time == 3.0
    reading.reader.forget(KEY, lambda stage, attempt: (stage, attempt) == ("curate", 1))
    assert reading.reader.get(KEY, "u") == {}


async def test_progress_of_a_run_that_had_the_name_before_is_not_its_own(reading):
    reading.worker.document = asdict(Progress(attempt=1, phase="running", step=1))
    reading.pods[:] = [replace(pod, run_uid="old") for pod in reading.pods]
    await reading.read()
    assert reading.reader.get(KEY, "new") == {}
    assert reading.reader.get(KEY, "old")["curate", 1].step == 1
    reading.pods[:] = [replace(pod, run_uid="new") for pod in reading.pods]
    await reading.read()
    assert reading.changes == [KEY, KEY], "the same words of another run are news"


@pytest.mark.parametrize(
    ("document", "status", "outcome"),
    [
        pytest.param("<html>", 200, "failed", id="no JSON"),
        pytest.param({"attempt": 1, "phase": "running"}, 503, "failed", id="an error"),
        pytest.param("1" * 100_000, 200, "failed", id="too much"),
        pytest.param({"attempt": 7, "phase": "running"}, 200, "ok", id="another attempt's worker at the same address"),
    ],
)
async def test_a_bad_answer_is_counted_and_ignored(reading, document, status, outcome):
    reading.worker.document, reading.worker.status = document, status
    await reading.read()
    assert (reading.outcomes, reading.changes, reading.reader.get(KEY, "u")) == ([outcome], [], {})


@pytest.mark.parametrize(
    "fields",
    [{"index": 1}, {"is_gone": True}, {"is_deleting": True}, {"phase": "Pending"}, {"ip": ""}],
    ids=lambda fields: next(iter(fields)),
)
async def test_only_the_first_worker_of_a_running_attempt_is_asked(reading, fields):
    reading.pods[:] = [build_pod("curate", **({"ip": "127.0.0.1"} | fields))]
    await reading.read()
    assert reading.outcomes == []


@pytest.mark.parametrize(("has_backpressure", "asked"), [(False, 50), (True, 12)])
async def test_so_many_workers_are_asked_a_round_and_fewer_in_a_rush(reading, has_backpressure, asked):
    reading.worker.document = asdict(Progress(attempt=1, phase="running"))
    reading.pods[:] = [replace(build_pod("curate", ip="127.0.0.1"), uid=f"pod-{n}") for n in range(120)]
    reading.rushes.extend(["rush"] * has_backpressure)
    await reading.read()
    assert reading.outcomes == ["ok"] * asked


async def test_who_never_answers_is_told_of(reading):
    reading.reader._monotonic = lambda: next(reading.times)
    reading.times = iter(range(0, 10**6, 100))
    reading.worker.status = 503
    await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}
    assert reading.changes == []
    for _ in range(5):
        await reading.read()
    why = reading.reader.get_errors(KEY, "u")["curate", 1]
    assert why.startswith("port ")
    assert why.endswith("of pod demo-curate-1-0: /progress answers 503")
    assert reading.changes == [KEY], "once"
    reading.worker.document, reading.worker.status = asdict(Progress(attempt=1, phase="running", step=1)), 200
    await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}


async def test_who_has_answered_before_is_not(reading):
    reading.reader._monotonic = lambda: next(reading.times)
    reading.times = iter(range(0, 10**6, 100))
    reading.worker.document = asdict(Progress(attempt=1, phase="running", step=1))
    await reading.read()
    reading.worker.status = 503
    for _ in range(8):
        await reading.read()
    assert reading.reader.get_errors(KEY, "u") == {}


async def test_the_server_answers_probes_and_scrapes():
    registry, problems = CollectorRegistry(), []
    Counter("sailvl_test", "A counter.", registry=registry).inc()
    settings = HealthServerSettings(host="127.0.0.1", port=0)
    async with (
        Server(settings, registry, is_alive=lambda: problems, is_ready=lambda: ["not yet"]) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
    ):

        async def ask(path: str) -> tuple[int, str]:
            async with session.get(path) as response:
                return response.status, await response.text()

        assert await ask("/healthz") == (200, "ok")
        assert await ask("/readyz") == (500, "not yet")
        problems.append("the watch of pods has been silent for 500 s")
        assert await ask("/healthz") == (500, problems[0])
        status, text = await ask("/metrics")
        assert status == 200
        assert "sailvl_test_total 1.0" in text


@pytest.mark.parametrize(
    ("age", "oldest", "deaf", "problems"),
    [
        pytest.param(1.0, 1.0, 0.0, [], id="well"),
        pytest.param(500.0, 1.0, 0.0, ["the watch of pods has been silent for 500 s"], id="a stale watch"),
        pytest.param(1.0, 400.0, 0.0, ["a key has waited for 400 s"], id="a stuck queue"),
        pytest.param(1.0, 1.0, 360.0, ["the watch of runs has missed changes for 360 s"], id="a deaf watch of runs"),
    ],
)
def test_liveness(age, oldest, deaf, problems):
    operator = object.__new__(Operator)
    operator.settings = Settings()
    operator.children = SimpleNamespace(ages=lambda: [("pods", age)])
    operator.queue = SimpleNamespace(oldest_seconds=lambda: oldest)
    operator.resync = SimpleNamespace(stale_seconds=lambda: deaf)
    operator.leadership = SimpleNamespace(is_leading=True)
    assert operator.find_problems() == problems
