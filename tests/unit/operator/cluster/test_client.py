"""The client against an API server with pages, errors and broken connections."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections import Counter
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.cluster import resources, watch_stream
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.errors import (
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    ServerError,
    TooManyRequests,
    Unreachable,
)
from tests.support.apiserver.http import FakeApiServer, InjectedError, serve

CALLS: Counter[tuple[str, int]] = Counter()


class Token:
    """A Configuration of the kubernetes package whose token changes with each read."""

    def __init__(self, host: str) -> None:
        self.host, self.reads, self.username = host, 0, ""

    def auth_settings(self) -> dict[str, dict[str, str]]:
        self.reads += 1
        return {"BearerToken": {"value": f"Bearer token-{self.reads}"}}


@pytest.fixture
async def world():
    CALLS.clear()
    api = FakeApiServer()
    async with serve(api) as url:
        token = Token(url)
        config = ClientConfig(backoff_seconds=0.001, page_size=2, max_tries=3)
        async with Client(
            Credentials(token), config, on_response=lambda verb, code: CALLS.update([(verb, code)])
        ) as client:
            yield SimpleNamespace(api=api, client=client, token=token)


def make(name: str, **labels: str) -> dict:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}}


async def test_list_is_read_in_pages(world):
    for i in range(5):
        world.api.put("pods", make(f"p{i}", app="x" if i != 1 else "y"))
    pages = [
        ([o["metadata"]["name"] for o in items], version)
        async for items, version in world.client.list_pages(resources.PODS, selector="app=x")
    ]
    assert pages == [(["p0", "p2"], str(world.api.version)), (["p3", "p4"], str(world.api.version))]
    assert CALLS == {("list", 200): 2}


async def test_page_that_is_too_large_is_read_with_fewer_objects(world, monkeypatch):
    monkeypatch.setattr("sailvl_operator.cluster.page_limit.MAX_PAGE_BYTES", 10_000)
    for i in range(20):
        world.api.put("pods", make(f"p{i:02}") | {"spec": {"wide": "x" * 1_000}})
    async with Client(Credentials(world.token), ClientConfig(page_size=16)) as client:
        pages = [page.items async for page in client.list_pages(resources.PODS, decode_as=resources.Versioned)]
    assert [item["metadata"]["name"] for page in pages for item in page] == [f"p{i:02}" for i in range(20)]
    assert [len(page) for page in pages] == [2, 4, 4, 4, 4, 2]
    assert CALLS == {}


async def test_resource_that_does_not_exist_is_told_by_the_metadata_of_one_object(world):
    world.api.put("pods", make("p"))
    await world.client.check_exists(resources.PODS)
    assert world.api.requests[-1].query["limit"] == "1"
    world.api.injected_errors.append(InjectedError(method="GET", path_end="/pods", status=404))
    with pytest.raises(NotFound):
        await world.client.check_exists(resources.PODS)


async def test_watch_starts_after_its_version_and_ends_with_a_bookmark(world):
    first = world.api.put("pods", make("old"))
    world.api.put("pods", make("new") | {"spec": {"long": "x" * 300_000}})
    world.api.put("pods", make("other") | {"metadata": {"name": "other", "namespace": "elsewhere"}})
    world.api.watch_seconds = 0.05
    version = first["metadata"]["resourceVersion"]
    seen = [e async for e in world.client.watch(resources.PODS, "team", selector="", resource_version=version)]
    assert [(type_, o["metadata"].get("name")) for type_, o in seen] == [("ADDED", "new"), ("BOOKMARK", None)]
    assert len(seen[0][1]["spec"]["long"]) == 300_000


def test_malformed_event_is_refused_without_being_decoded():
    line = msgspec.json.encode({"type": "ADDED", "object": {"metadata": 5, "spec": {"ingress": [{}] * 300_000}}})
    tracemalloc.start()
    try:
        with pytest.raises(Unreachable, match="metadata"):
            watch_stream.decode_event(line, "/pods", resources.Pod)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


async def test_changes_in_quick_succession_are_read_in_batches(world, monkeypatch):
    pauses = []
    pause = watch_stream._pause_after

    async def count(read, **which):
        pauses.append(read)
        await pause(read, **which)

    monkeypatch.setattr(watch_stream, "_pause_after", count)
    first = world.api.put("pods", make("first"))
    watch = world.client.watch(resources.PODS, resource_version=first["metadata"]["resourceVersion"])

    async def read(number: int) -> list[str]:
        return [(await anext(watch))[1]["metadata"]["name"] for _ in range(number)]

    reading = asyncio.create_task(read(40))
    for i in range(40):
        world.api.put("pods", make(f"p{i}"))
        await asyncio.sleep(watch_stream.BATCH_SECONDS / 20)
    assert await asyncio.wait_for(reading, 1) == [f"p{i}" for i in range(40)]
    assert len(pauses) < 10
    await watch.aclose()


@pytest.mark.parametrize(
    ("read", "is_whole", "waits"),
    [
        pytest.param(5_000, True, True, id="one change"),
        pytest.param(5_000, False, False, id="part of a line"),
        pytest.param(100_000, True, False, id="large read"),
    ],
)
async def test_reader_pauses_only_when_it_has_caught_up(read, is_whole, waits):
    began = asyncio.get_running_loop().time()
    await watch_stream._pause_after(read, is_whole=is_whole)
    assert (asyncio.get_running_loop().time() - began >= watch_stream.BATCH_SECONDS) is waits


async def test_server_url_may_have_a_path():
    paths = []

    async def answer(request: web.Request) -> web.Response:
        paths.append(request.path_qs)
        return web.json_response({"metadata": {"name": "p"}})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        token = Token(str(server.make_url("/k8s/clusters/c-1/")))
        async with Client(Credentials(token)) as client:
            await client.get(resources.PODS, "team", "p")
            await client.delete_collection(resources.PODS, "team", selector="app in (a,b)")
    assert paths == [
        "/k8s/clusters/c-1/api/v1/namespaces/team/pods/p",
        "/k8s/clusters/c-1/api/v1/namespaces/team/pods?labelSelector=app+in+%28a%2Cb%29",
    ]


@pytest.mark.parametrize(
    ("resource", "decode_as"),
    [(resources.JOBS, resources.Job), (resources.PODS, resources.Pod), (resources.SERVICES, resources.Service)],
    ids=lambda value: getattr(value, "plural", ""),
)
async def test_bookmark_need_not_match_the_decoded_type(world, resource, decode_as):
    """Bookmarks of a real API server are tested in tests/cluster/test_watches.py."""
    world.api.watch_seconds = 0.05
    seen = [e async for e in world.client.watch(resource, resource_version="1", decode_as=decode_as)]
    assert [(type_, set(o["metadata"])) for type_, o in seen] == [
        ("BOOKMARK", {"resourceVersion", "creationTimestamp"})
    ]


async def test_expired_version_raises_gone(world):
    world.api.compact()
    with pytest.raises(Gone):
        [e async for e in world.client.watch(resources.PODS, resource_version="1")]


@pytest.mark.parametrize(
    ("status", "times", "error", "calls"),
    [
        pytest.param(503, 2, None, {("create", 503): 2, ("create", 200): 1}, id="succeeds within the tries"),
        pytest.param(500, 9, ServerError, {("create", 500): 3}, id="fails after the last try"),
        pytest.param(429, 9, TooManyRequests, {("create", 429): 3}, id="too many requests"),
        pytest.param(403, 9, Forbidden, {("create", 403): 1}, id="forbidden is not retried"),
        pytest.param(409, 9, Conflict, {("create", 409): 1}, id="conflict is not retried"),
        pytest.param(401, 1, None, {("create", 401): 1, ("create", 200): 1}, id="expired token is read again"),
    ],
)
async def test_only_transient_errors_are_retried(world, status, times, error, calls):
    world.api.injected_errors = [InjectedError(method="POST", path_end="/pods", status=status, times=times)]
    if error is None:
        await world.client.create(resources.PODS, "team", make("p"))
        assert world.api.list_names("pods") == {"p"}
    else:
        with pytest.raises(error):
            await world.client.create(resources.PODS, "team", make("p"))
    assert dict(CALLS) == calls
    assert world.token.reads == (2 if status == 401 else 1)


async def test_retry_after_is_respected(world):
    world.api.injected_errors = [InjectedError(method="GET", path_end="/p", status=429, headers={"Retry-After": "1"})]
    world.api.put("pods", make("p"))
    started = asyncio.get_running_loop().time()
    await world.client.get(resources.PODS, "team", "p")
    assert asyncio.get_running_loop().time() - started >= 1


async def test_failed_precondition_raises_conflict(world):
    pod = world.api.put("pods", make("p"))
    stale = {"metadata": {"resourceVersion": "1"}, "status": {"phase": "Failed"}}
    with pytest.raises(Conflict):
        await world.client.patch(resources.PODS, "team", "p", stale, subresource="status")
    with pytest.raises(Conflict):
        await world.client.delete(resources.PODS, "team", "p", uid="another")
    with pytest.raises(NotFound):
        await world.client.delete(resources.PODS, "team", "q", uid="another")
    await world.client.delete(resources.PODS, "team", "p", uid=pod["metadata"]["uid"])
    assert world.api.list_objects("pods") == []


async def test_collection_is_deleted_by_labels_with_a_grace_period(world):
    world.api.put("pods", make("a", job="x"))
    world.api.put("pods", make("b", job="y"))
    await world.client.delete_collection(resources.PODS, "team", selector="job=x", grace_seconds=1)
    assert world.api.list_names("pods") == {"b"}
    assert world.api.requests[-1][3] == {"gracePeriodSeconds": 1}


async def test_writes_name_the_field_manager(world):
    world.api.put("pods", make("p"))
    await world.client.patch(resources.PODS, "team", "p", {"spec": {"nodeName": "n"}})
    assert world.api.list_objects("pods")[0]["spec"] == {"nodeName": "n"}
    assert world.api.requests[-1][2] == {"fieldManager": "sailvl-operator"}


async def test_refused_connection_raises_unreachable():
    config = ClientConfig(backoff_seconds=0.001, max_tries=2)
    async with Client(Credentials(Token("http://127.0.0.1:9")), config) as client:
        with pytest.raises(Unreachable, match="get /api/v1/namespaces/team/pods/p"):
            await client.get(resources.PODS, "team", "p")
        with pytest.raises(Unreachable):
            [e async for e in client.watch(resources.PODS, resource_version="1")]


@asynccontextmanager
async def answering(*bodies: bytes):
    """Yield a client of a server that sends these responses, and repeats the last one."""
    given = list(bodies)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=given.pop(0) if len(given) > 1 else given[0], content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    config = ClientConfig(backoff_seconds=0.001, max_tries=3)
    async with (
        TestServer(app) as server,
        Client(Credentials(Token(str(server.make_url("")))), config) as client,
    ):
        yield client


async def test_truncated_response_is_requested_again():
    async with answering(b'{"metadata": {"na', b"[]", b'{"metadata": {}}') as client:
        assert await client.get(resources.PODS, "team", "p") == {"metadata": {}}
    async with answering(b'{"metadata": {"na') as client:
        with pytest.raises(Unreachable, match="the response is malformed"):
            await client.get(resources.PODS, "team", "p")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        pytest.param(b'{"type": "ADDED", "obj\n', Unreachable, "an event is malformed", id="malformed line"),
        pytest.param(b'{"kind": "Status"}\n', Unreachable, "an event is malformed", id="not an event"),
        pytest.param(
            b'{"type": "ERROR", "object": {"code": 500, "message": "etcd"}}\n', ServerError, "etcd", id="server error"
        ),
        pytest.param(b'{"type": "ERROR", "object": {"reason": "Expired"}}\n', Gone, "watch", id="expired version"),
    ],
)
async def test_watch_ends_with_the_error_of_the_event(line, error, message):
    event = b'{"type": "ADDED", "object": {"metadata": {"name": "p"}}}\n'
    async with answering(event + line) as client:
        watch = client.watch(resources.PODS, resource_version="1")
        assert await anext(watch) == ("ADDED", {"metadata": {"name": "p"}})
        with pytest.raises(error, match=message):
            await anext(watch)


async def test_incomplete_last_line_is_dropped():
    async with answering(b'{"type": "ADDED", "object": {}}\n{"type": "ADDED", "object": {}}') as client:
        assert [e async for e in client.watch(resources.PODS, resource_version="1")] == [("ADDED", {})]


async def test_client_without_the_lease_only_reads(world):
    world.api.put("pods", make("p"))
    world.client.may_write = lambda: False
    with pytest.raises(ApiError, match="the lease of this replica has expired"):
        await world.client.create(resources.PODS, "team", make("q"))
    assert await world.client.get(resources.PODS, "team", "p")
    assert dict(CALLS) == {("get", 200): 1}


async def test_clock_follows_the_date_of_responses(world):
    world.api.put("pods", make("p"))
    clock = world.client._clock
    clock._wall = lambda: 0.0
    assert clock.now() == 0.0
    await world.client.get(resources.PODS, "team", "p")
    assert clock.now() > 1_700_000_000


async def test_connections_detect_a_lost_peer(world):
    world.api.put("pods", make("p"))
    await world.client.get(resources.PODS, "team", "p")
    [[(protocol, _)]] = world.client._session.connector._conns.values()
    opened = protocol.transport.get_extra_info("socket")
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
    assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert [opened.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [15, 5, 5000]
