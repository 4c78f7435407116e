"""Leader election against an API server, on a clock of its own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from fake_api import Anonymous, FakeApi, Refusal, serve
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.lease import Leadership
from sailvl_operator.errors import LostLease
from sailvl_operator.settings import ApiSettings, LeaseSettings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def candidates(*identities: str):
    """Leaderships of several processes over one API server and one clock."""
    api, clock = FakeApi(), Clock()
    async with serve(api) as url, Client(Credentials(Anonymous(url)), ApiSettings(tries=1), lambda *_: None) as client:
        yield (
            api,
            clock,
            [
                Leadership(
                    client,
                    LeaseSettings(identity=i, namespace="team", renew_interval=0.01),
                    monotonic=clock,
                    wall=clock,
                )
                for i in identities
            ],
        )


def holder(api: FakeApi) -> tuple[str, int]:
    [lease] = api.all("leases")
    return lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]


async def is_acquired(leadership: Leadership, seconds: float = 0.2) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await leadership.acquire()
    except TimeoutError:
        return False
    return leadership.is_leading


async def test_the_first_one_leads_and_the_second_waits_until_the_lease_has_not_moved_for_its_duration():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a)
        assert not await is_acquired(b)
        clock.now += 14
        assert not await is_acquired(b)
        clock.now += 2
        assert await is_acquired(b)
        assert holder(api) == ("b", 2)


async def test_a_renewed_lease_is_not_taken():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a)
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


async def test_who_is_overtaken_ends():
    async with candidates("a", "b") as (api, clock, (a, b)):
        assert await is_acquired(a)
        assert not await is_acquired(b)
        clock.now += 20
        assert await is_acquired(b)
        with pytest.raises(LostLease, match="another replica"):
            await a.keep()
        assert (a.is_leading, b.is_leading) == (False, True)
        await a.release()
        assert holder(api) == ("b", 2)


async def test_who_cannot_renew_ends_before_the_lease_runs_out():
    async with candidates("a") as (api, clock, (a,)):
        assert await is_acquired(a)
        api.refusals = [Refusal(method="PUT", path_end="/leases/sailvl-operator", status=503, times=10_000)]
        keeping = asyncio.create_task(a.keep())
        await asyncio.sleep(0.1)
        assert not keeping.done()
        clock.now += 11
        with pytest.raises(LostLease, match="could not be renewed"):
            await keeping


async def test_a_released_lease_is_free_at_once():
    async with candidates("a", "b") as (api, _, (a, b)):
        assert await is_acquired(a)
        await a.release()
        assert await is_acquired(b)
        assert holder(api) == ("b", 3)
