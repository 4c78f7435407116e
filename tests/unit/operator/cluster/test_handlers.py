"""The whole process against an API server: kopf's watch, the lease, the engine, a clean end."""

from __future__ import annotations

import asyncio
import copy
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import aiohttp
import pytest

from sailvl_operator.cli.operator import Operator
from sailvl_operator.cluster.client import ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.errors import LeaseLost
from sailvl_operator.settings import HealthServerSettings, LeaseSettings, ProgressSettings, Settings
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.builders.operator import build_document

LEASE = LeaseSettings(namespace="team", renew_interval=0.2, renew_deadline=50, duration=60)


def make_settings(identity: str) -> Settings:
    return Settings(
        lease=replace(LEASE, identity=identity),
        server=HealthServerSettings(host="127.0.0.1", port=0),
        progress=ProgressSettings(interval=0),
    )


class Process:
    """An operator with a thread and an event loop of its own: kopf takes every task of its loop for one of its own,
    and waits for it, or cancels it, when it ends."""

    def __init__(self, url: str, identity: str) -> None:
        self.operator = Operator(
            make_settings(identity),
            Credentials(AnonymousConfiguration(url)),
            client_config=ClientConfig(backoff_seconds=0.01),
        )
        self.ended = asyncio.create_task(asyncio.to_thread(asyncio.run, self._serve()))

    async def _serve(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        await self.operator.serve()

    async def end(self) -> None:
        """Tell it to, and wait for it."""
        await until(lambda: hasattr(self, "_task"))
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        await asyncio.gather(self.ended, return_exceptions=True)


@asynccontextmanager
async def operating(url: str, identity: str = "a"):
    process = Process(url, identity)
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


async def test_kopf_brings_runs_in_and_writes_nothing_itself(api):
    async with serve(api) as url:
        api.put("sailvlruns", build_document())
        async with operating(url) as process:
            operator = process.operator
            await until(lambda: api.list_names("jobs") == {"demo-curate-1"})
            second = build_document()
            second["metadata"]["name"] = "later"
            api.put("sailvlruns", second)
            await until(lambda: "later-curate-1" in api.list_names("jobs"))
            api.remove_named("sailvlruns", "later")
            await until(lambda: len(operator.runs) == 1)
            async with (
                aiohttp.ClientSession(f"http://127.0.0.1:{operator.server.port}") as session,
                session.get("/readyz") as ready,
                session.get("/metrics") as metrics,
            ):
                assert ready.status == 200
                text = await metrics.text()
    assert 'sailvl_operator_api_calls_total{code="200",verb="create"}' in text
    assert "sailvl_operator_leading 1.0" in text
    runs = {path for method, path in api.list_writes() if "sailvlruns" in path}
    assert {path.rsplit("/", 1)[-1] for path in runs} == {"status"}, "kopf adds no annotations and no finalizers"
    assert "finalizers" not in api.list_objects("sailvlruns")[0]["metadata"]


async def test_a_standby_takes_over_at_once_from_one_that_ends_cleanly(api):
    async with serve(api) as url, operating(url, "b") as first:
        await until(lambda: first.operator.leadership.is_leading)
        async with operating(url, "c") as second:
            api.put("sailvlruns", build_document())
            await until(lambda: api.list_names("jobs"))
            await until(lambda: len(second.operator.runs) == 1)
            assert not second.operator.leadership.is_leading
            assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "b"
            await first.end()
            began = time.monotonic()
            await until(lambda: second.operator.leadership.is_leading, LEASE.duration)
            assert time.monotonic() - began < LEASE.duration / 6, "the lease was released: nobody waited for its end"
            assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "c"
    assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == ""


async def test_who_loses_the_lease_ends_the_process(api):
    async with serve(api) as url, operating(url) as process:
        await until(lambda: process.operator.leadership.is_leading)
        lease = copy.deepcopy(api.list_objects("leases")[0])
        lease["spec"]["holderIdentity"] = "b"
        api.put("leases", lease)
        api.put("sailvlruns", build_document())
        with pytest.raises(BaseExceptionGroup) as error:
            await asyncio.wait_for(process.ended, 8)
        assert error.value.subgroup(LeaseLost) is not None
        assert api.list_objects("leases")[0]["spec"]["holderIdentity"] == "b"
