"""The whole process in one event loop against an API server: kopf's watch, the lease, the engine, a clean end."""

from __future__ import annotations

import asyncio
import copy
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import aiohttp
import pytest

from builders import build_document
from fake_api import Anonymous, FakeApi, serve
from sailvl_operator.cli.operator import Operator
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.errors import LostLease
from sailvl_operator.settings import ApiSettings, LeaseSettings, ProgressSettings, ServerSettings, Settings


def make_settings(identity: str) -> Settings:
    return Settings(
        api=ApiSettings(backoff=0.01),
        lease=LeaseSettings(identity=identity, namespace="team", renew_interval=0.05, renew_deadline=0.4, duration=0.5),
        server=ServerSettings(host="127.0.0.1", port=0),
        progress=ProgressSettings(interval=0),
    )


@asynccontextmanager
async def operating(url: str, identity: str = "a"):
    operator = Operator(make_settings(identity), Credentials(Anonymous(url)))
    task = asyncio.create_task(operator.serve())
    try:
        yield operator
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition, seconds: float = 8.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture
async def api():
    api = FakeApi()
    api.created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return api


async def test_kopf_brings_runs_in_and_writes_nothing_itself(api):
    async with serve(api) as url:
        await api.put("sailvlruns", build_document())
        async with operating(url) as operator:
            await until(lambda: api.names("jobs") == {"demo-curate-1"})
            second = build_document()
            second["metadata"]["name"] = "later"
            await api.put("sailvlruns", second)
            await until(lambda: "later-curate-1" in api.names("jobs"))
            await api.remove("sailvlruns", "later")
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
    runs = {path for method, path in api.writes() if "sailvlruns" in path}
    assert {path.rsplit("/", 1)[-1] for path in runs} == {"status"}, "kopf adds no annotations and no finalizers"
    assert "finalizers" not in api.all("sailvlruns")[0]["metadata"]


async def test_a_standby_takes_over_at_once_from_one_that_ends_cleanly(api):
    async with serve(api) as url, operating(url, "b") as b:
        await until(lambda: b.leadership.is_leading)
        async with operating(url, "c") as c:
            await api.put("sailvlruns", build_document())
            await until(lambda: api.names("jobs"))
            await until(lambda: len(c.runs) == 1)
            assert not c.leadership.is_leading
            first = copy.deepcopy(api.all("leases")[0]["spec"])
            assert first["holderIdentity"] == "b"
    assert api.all("leases")[0]["spec"]["holderIdentity"] == ""


async def test_who_loses_the_lease_ends_the_process(api):
    async with serve(api) as url:
        operator = Operator(make_settings("a"), Credentials(Anonymous(url)))
        task = asyncio.create_task(operator.serve())
        await until(lambda: operator.leadership.is_leading)
        lease = copy.deepcopy(api.all("leases")[0])
        lease["spec"]["holderIdentity"] = "b"
        await api.put("leases", lease)
        await api.put("sailvlruns", build_document())
        with pytest.raises(BaseExceptionGroup) as error:
            await asyncio.wait_for(task, 8)
        assert error.value.subgroup(LostLease) is not None
        assert api.all("leases")[0]["spec"]["holderIdentity"] == "b"
