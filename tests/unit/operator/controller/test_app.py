"""The whole process against an API server: kopf's watch, the Lease, the controller and a clean exit."""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.api.untrusted import RECURSION_LIMIT, allow_deep_objects
from sailvl_operator.app import App
from sailvl_operator.cli import operator as operator_command
from sailvl_operator.cluster.client import ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.errors import LeaseLost
from sailvl_operator.settings import ControllerSettings, HealthSettings, LeaseSettings, OperatorSettings
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.builders.operator import build_document
from tests.support.controller_world import make_pod

LEASE = LeaseSettings(namespace="team", renew_interval_seconds=0.2, renew_deadline_seconds=50, duration_seconds=60)


def make_settings(identity: str, progress_seconds: float) -> OperatorSettings:
    return OperatorSettings(
        lease=replace(LEASE, identity=identity),
        health=HealthSettings(host="127.0.0.1", port=0),
        controller=ControllerSettings(progress_interval_seconds=progress_seconds),
    )


class Process:
    """An operator in a thread and an event loop of its own, because kopf waits for all tasks of its loop, or cancels
    them, when it ends."""

    def __init__(self, url: str, identity: str, progress_seconds: float) -> None:
        self.app = App(
            make_settings(identity, progress_seconds),
            Credentials(AnonymousConfiguration(url)),
            client_config=ClientConfig(backoff_seconds=0.01),
        )
        self.ended = asyncio.create_task(asyncio.to_thread(asyncio.run, self._serve()))

    async def _serve(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        await self.app.serve()

    async def end(self) -> None:
        """Cancel the operator and wait until it has ended."""
        await until(lambda: hasattr(self, "_task"))
        with suppress(RuntimeError):  # the event loop has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        await asyncio.gather(self.ended, return_exceptions=True)


@asynccontextmanager
async def operating(url: str, identity: str = "a", *, progress_seconds: float = 0.0):
    process = Process(url, identity, progress_seconds)
    try:
        yield process
    finally:
        await process.end()


async def until(condition, seconds: float = 8.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture
async def api():
    return FakeApiServer(clock=time.time)


async def test_runs_arrive_through_kopf_which_writes_nothing(api):
    async with serve(api) as url:
        api.put("sailvlruns", build_document())
        async with operating(url) as process:
            app = process.app
            await until(lambda: api.list_names("jobs") == {"demo-curate-1"})
            second = build_document()
            second["metadata"]["name"] = "later"
            api.put("sailvlruns", second)
            await until(lambda: "later-curate-1" in api.list_names("jobs"))
            api.remove_named("sailvlruns", "later")
            await until(lambda: len(app.parts.runs) == 1)
            async with (
                aiohttp.ClientSession(f"http://127.0.0.1:{app.server.port}") as session,
                session.get("/readyz") as ready,
                session.get("/metrics") as metrics,
                session.get("/metrics/operator") as operator_metrics,
            ):
                assert ready.status == 200
                text, operator_text = await metrics.text(), await operator_metrics.text()
    assert 'sailvl_operator_api_calls_total{code="200",verb="create"}' in text
    for page in (text, operator_text):
        assert "sailvl_operator_leading 1.0" in page
    assert 'sailvl_run_stage_state{namespace="team"' in text
    assert "sailvl_run" not in operator_text
    runs = {path for method, path in api.list_writes() if "sailvlruns" in path}
    assert {path.rsplit("/", 1)[-1] for path in runs} == {"status"}, "kopf must add neither annotations nor finalizers"
    assert "finalizers" not in api.list_objects("sailvlruns")[0]["metadata"]


async def test_kopf_writes_nothing_to_a_run_with_its_own_markers(api):
    marked = build_document()
    marked["metadata"] |= {
        "finalizers": ["kopf.zalando.org/KopfFinalizerMarker"],
        "annotations": {
            "kopf.zalando.org/last-handled-configuration": '{"spec": {}}',
            "kopf.zalando.org/on_run_event": '{"started": "2020-01-01T00:00:00", "retries": 1}',
        },
    }
    async with serve(api) as url:
        stored = copy.deepcopy(api.put("sailvlruns", marked)["metadata"])
        async with operating(url):
            await until(lambda: api.list_names("jobs"))
            api.put("sailvlruns", api.list_objects("sailvlruns")[0] | {"spec": build_document(seed=2)["spec"]})
            await until(lambda: api.requests[-1].method != "GET")
    metadata = api.list_objects("sailvlruns")[0]["metadata"]
    assert [metadata[n] for n in ("finalizers", "annotations")] == [stored[n] for n in ("finalizers", "annotations")]
    assert {path.rsplit("/", 1)[-1] for _, path in api.list_writes() if "sailvlruns" in path} == {"status"}


async def test_kopf_holds_no_event_for_long_after_it_was_handled(api):
    def list_kopf_workers(process: Process) -> list[str]:
        return [n for task in asyncio.all_tasks(process._loop) if (n := task.get_name()).startswith("worker for")]

    async with serve(api) as url:
        api.put("sailvlruns", build_document())
        async with operating(url) as process:
            await until(lambda: len(process.app.parts.runs) == 1)
            await until(lambda: not list_kopf_workers(process), 2)


async def test_standby_takes_over_at_once_after_clean_exit(api):
    async with serve(api) as url, operating(url, "b") as first:
        await until(lambda: first.app.leadership.is_leading)
        async with operating(url, "c") as second:
            api.put("sailvlruns", build_document())
            await until(lambda: api.list_names("jobs"))
            await until(lambda: len(second.app.parts.runs) == 1)
            assert not second.app.leadership.is_leading
            assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "b"
            await first.end()
            began = time.monotonic()
            await until(lambda: second.app.leadership.is_leading, LEASE.duration_seconds)
            assert time.monotonic() - began < LEASE.duration_seconds / 6, (
                "the Lease was not released, so the standby waited for it to expire"
            )
            assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "c"
    assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == ""


async def test_losing_the_lease_ends_the_process(api):
    async with serve(api) as url, operating(url) as process:
        await until(lambda: process.app.leadership.is_leading)
        lease = copy.deepcopy(api.list_objects("leases")[0])
        lease["spec"]["holderIdentity"] = "b"
        api.put("leases", lease)
        api.put("sailvlruns", build_document())
        with pytest.raises(BaseExceptionGroup) as error:
            await asyncio.wait_for(process.ended, 8)
        assert error.value.subgroup(LeaseLost) is not None
        assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "b"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"attempt":1,"phase":"running","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}", id="too deep"),
        pytest.param(b'{"attempt":1,"phase":"running","metrics":{"\xff":1}}', id="not UTF-8"),
    ],
)
async def test_answer_of_a_worker_does_not_end_the_operator(api, body):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    app = web.Application()
    app.router.add_get("/progress", answer)
    async with TestServer(app, host="127.0.0.1") as worker, serve(api) as url:
        api.put("sailvlruns", build_document())
        async with operating(url, progress_seconds=0.05) as process:
            reader = process.app.parts.progress
            reader._port, reader._may_read = worker.port, lambda _: True
            await until(lambda: api.list_names("jobs"))
            pod = make_pod("curate", 1, 0, "Running", job_uid=api.list_objects("jobs")[0]["metadata"]["uid"])
            pod["status"]["podIP"] = "127.0.0.1"
            api.put("pods", pod)
            await until(lambda: any(schedule.failures > 1 for schedule in reader._schedules.values()))
            second = build_document()
            second["metadata"]["name"] = "later"
            api.put("sailvlruns", second)
            await until(lambda: "later-curate-1" in api.list_names("jobs"))
            assert not process.ended.done()


@pytest.fixture
def deep_objects_allowed():
    limit = sys.getrecursionlimit()
    allow_deep_objects()
    yield
    sys.setrecursionlimit(limit)


def nest_fields(depth: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(depth):
        fields = {"f:a": fields}
    return fields


@pytest.mark.usefixtures("deep_objects_allowed")
async def test_object_with_deep_managed_fields_does_not_blind_the_operator(api):
    async with serve(api) as url:
        for plural, deep in (("sailvlruns", build_document()), ("pods", make_pod("x", 1, 0, "Running", job_uid="x"))):
            deep["metadata"] |= {"name": "deep", "managedFields": [{"fieldsV1": nest_fields(9_900)}]}
            api.put(plural, deep)
        api.put("sailvlruns", build_document())
        async with operating(url) as process:
            await until(lambda: api.list_names("jobs") == {"deep-curate-1", "demo-curate-1"})
            assert not process.ended.done()


@pytest.fixture
def run_command(monkeypatch):
    """Return a function that runs the command with flags and an App that serves nothing; and the recursion limit."""

    def run(*flags: str) -> list[int]:
        limits = []

        class Served:
            def __init__(self, *_: object) -> None:
                pass

            async def serve(self) -> None:
                limits.append(sys.getrecursionlimit())

        monkeypatch.setattr("sailvl_operator.cli.operator.App", Served)
        parser = argparse.ArgumentParser()
        operator_command.add_arguments(parser)
        assert operator_command.run(parser.parse_args(flags)) == 0
        return limits

    monkeypatch.setattr("sailvl_operator.cli.operator._tune_gc", lambda: None)
    monkeypatch.setattr("sailvl_operator.cli.operator.configure_logging", lambda *_: None)
    monkeypatch.setattr(
        "sailvl_operator.cli.operator.load_credentials", lambda *_: Credentials(AnonymousConfiguration("http://x"))
    )
    return run


@pytest.mark.usefixtures("deep_objects_allowed")
def test_command_allows_deep_objects(run_command):
    sys.setrecursionlimit(1000)
    assert run_command() == [RECURSION_LIMIT]


@pytest.mark.usefixtures("deep_objects_allowed")
def test_command_warns_of_an_allow_list_that_is_set_but_empty(run_command, monkeypatch, caplog):
    monkeypatch.setenv("SAILVL_OPERATOR_ALLOWED_SERVER_HOSTS", " ")
    run_command("--allowed-images=", "--allowed-priority-classes=batch")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"{flag} is set, but empty, so it allows everything; add entries, or leave the flag out"
        for flag in ("--allowed-images", "--allowed-server-hosts")
    ]
