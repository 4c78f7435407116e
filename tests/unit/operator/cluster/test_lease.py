"""Leader election against an API server, with a fake clock."""

from __future__ import annotations

import asyncio
import copy
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.lease import Leadership
from sailvl_operator.errors import ApiError, LeaseLost
from sailvl_operator.settings import LeaseSettings
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, InjectedError, serve


class ManualClock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def candidates(*identities: str):
    """Candidates of several processes that share one API server and one clock."""
    api, clock = FakeApiServer(), ManualClock()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve(api))

        async def candidate(identity: str) -> Leadership:
            client = Client(Credentials(AnonymousConfiguration(url)), ClientConfig(max_tries=1))
            settings = LeaseSettings(identity=identity, namespace="team", renew_interval_seconds=0.01)
            return Leadership(await stack.enter_async_context(client), settings, monotonic=clock)

        yield api, clock, [await candidate(identity) for identity in identities]


def holder(api: FakeApiServer) -> tuple[str, int]:
    [lease] = api.list_objects("leases")
    return lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]


async def is_acquired(leadership: Leadership, seconds: float = 0.2) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await leadership.acquire()
    except TimeoutError:
        return False
    return leadership.is_leading


async def test_standby_leads_after_the_lease_was_not_renewed_for_its_duration():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a, 5.0)
        assert not await is_acquired(b)
        clock.now += 14
        assert not await is_acquired(b)
        clock.now += 2
        assert await is_acquired(b, 5.0)
        assert holder(api) == ("b", 2)


async def test_renewed_lease_is_not_taken():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a, 5.0)
        assert not await is_acquired(b)
        keeping = asyncio.create_task(a.keep())
        version = api.version
        clock.now += 9
        while api.version == version:
            await asyncio.sleep(0.01)
        clock.now += 9
        assert not await is_acquired(b)
        keeping.cancel()
        assert holder(api) == ("a", 1)


async def set_holder(api: FakeApiServer, holder: str) -> None:
    """Set the holder, as another client would."""
    lease = copy.deepcopy(api.list_objects("leases")[0])
    lease["spec"]["holderIdentity"] = holder
    api.put("leases", lease)


async def test_leader_exits_when_another_replica_takes_the_lease():
    async with candidates("a") as (api, _, (a,)):
        assert await is_acquired(a, 5.0)
        await set_holder(api, "b")
        with pytest.raises(LeaseLost, match="taken by another replica"):
            await a.keep()
        assert not a.is_leading
        await a.release()
        assert holder(api) == ("b", 1)


async def test_leader_exits_when_the_lease_is_deleted():
    async with candidates("a") as (api, _, (a,)):
        assert await is_acquired(a, 5.0)
        api.remove_named("leases", "sailvl-operator")
        with pytest.raises(LeaseLost, match="about to be"):
            await a.keep()


async def test_paused_leader_writes_nothing_after_the_deadline():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a, 5.0)
        assert not await is_acquired(b)
        clock.now += 20
        with pytest.raises(ApiError, match="has expired"):
            await a._client.create(resources.PODS, "team", {"metadata": {"name": "p"}})
        assert await is_acquired(b, 5.0)
        with pytest.raises(LeaseLost, match="lease not renewed"):
            await a.keep()
        assert (api.list_objects("pods"), holder(api)) == ([], ("b", 2))


@pytest.mark.parametrize("lost", [1, 3], ids=["once", "repeatedly"])
async def test_lost_response_of_a_renewal_does_not_lose_the_lease(lost):
    async with candidates("a") as (api, _, (a,)):
        assert await is_acquired(a, 5.0)
        for _ in range(lost):
            await set_holder(api, "a")  # our own write; only its response was lost
            await a._renew()
        await set_holder(api, "a")
        await a.release()
        assert holder(api) == ("", 2)


@pytest.mark.slow
async def test_release_is_limited_in_time():
    async with candidates("a") as (api, _, (a,)):
        assert await is_acquired(a, 5.0)
        api.injected_errors = [
            InjectedError(method="PUT", path_end="/leases/sailvl-operator", status=409, times=10_000)
        ]
        async with asyncio.timeout(3):
            await a.release()
        assert holder(api) == ("a", 1)


async def test_leader_that_cannot_renew_exits_before_the_lease_expires():
    async with candidates("a") as (api, clock, (a,)):
        assert await is_acquired(a, 5.0)
        api.injected_errors = [
            InjectedError(method="PUT", path_end="/leases/sailvl-operator", status=503, times=10_000)
        ]
        keeping = asyncio.create_task(a.keep())
        await asyncio.sleep(0.1)
        assert not keeping.done()
        clock.now += 11
        with pytest.raises(LeaseLost, match="lease not renewed"):
            await keeping


async def test_released_lease_can_be_taken_at_once():
    async with candidates("a", "b") as (api, _, (a, b)):
        assert await is_acquired(a, 5.0)
        await a.release()
        assert await is_acquired(b, 5.0)
        assert holder(api) == ("b", 3)
