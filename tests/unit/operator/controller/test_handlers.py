"""Watch of runs by kopf: responses that would end kopf, and what its session makes of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.handlers import build_session
from tests.support.apiserver.http import AnonymousConfiguration

ADDED = {"type": "ADDED", "object": {"metadata": {"name": "a"}}}
EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
TROUBLE = {"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "InternalError", "message": "etcd"}}


class Rotated(AnonymousConfiguration):
    """Credentials whose first token has expired."""

    reads = 0

    def auth_settings(self):
        self.reads += 1
        return {"BearerToken": {"value": f"Bearer token-{self.reads}"}}


@pytest.fixture
async def world():
    """A server with one response to all requests."""
    world = SimpleNamespace(status=200, body=b"{}", tokens=[], refused=0)

    async def answer(request: web.Request) -> web.Response:
        world.tokens.append(request.headers["Authorization"])
        if "continue" in request.query:
            return web.json_response({}, status=410)
        if len(world.tokens) <= world.refused:
            return web.json_response({}, status=401)
        return web.Response(status=world.status, body=world.body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/runs", answer)
    async with TestServer(app) as server:
        world.url = str(server.make_url("/runs"))
        known = world.known = set()
        async with build_session(Credentials(Rotated(world.url)), lambda *state: state in known) as session:
            world.session = session
            yield world


async def watch(world) -> list[dict]:
    async with world.session.get(world.url, params={"watch": "true"}) as response:
        assert response.status == 200
        text = b"".join([chunk async for chunk in response.content.iter_chunked(1024)])
    return [json.loads(line) for line in text.splitlines()]


def lines(*events: object) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


@pytest.mark.parametrize(
    ("status", "body", "seen"),
    [
        pytest.param(200, lines(ADDED, ADDED), [ADDED, ADDED], id="events"),
        pytest.param(200, lines(ADDED) + lines(ADDED)[:9], [ADDED], id="incomplete last line is dropped"),
        pytest.param(200, lines(ADDED, EXPIRED), [ADDED, EXPIRED], id="expired version is passed on"),
        pytest.param(410, b"{}", [EXPIRED], id="expired version as HTTP status"),
        pytest.param(200, lines(TROUBLE), "500 InternalError: etcd", id="server error ends the watch"),
        pytest.param(
            200, b'{"type": "ADD\n' + lines(ADDED), "an event is malformed", id="malformed line ends the watch"
        ),
    ],
)
async def test_watch_passes_on_what_kopf_can_handle(world, status, body, seen):
    world.status, world.body = status, body
    if isinstance(seen, str):
        with pytest.raises(aiohttp.ClientPayloadError, match=seen):
            await watch(world)
    else:
        assert await watch(world) == seen


@pytest.mark.parametrize(
    ("body", "is_malformed"),
    [
        pytest.param(b'{"items": [{"a": 1}]}', False, id="complete"),
        pytest.param(b'{"items": [{"a": ', True, id="truncated"),
        pytest.param(b"<html>", True, id="not JSON"),
    ],
)
async def test_malformed_response_is_a_failed_connection(world, body, is_malformed):
    world.body = body
    if is_malformed:
        with pytest.raises(aiohttp.ClientConnectionError, match="the response is malformed"):
            await world.session.get(world.url)
    else:
        async with world.session.get(world.url) as response:
            assert await response.json() == {"items": [{"a": 1}]}


async def test_list_whose_continue_token_has_expired_begins_again(world):
    """Otherwise kopf would end the process, as for every error of a list except 429."""
    world.body = b'{"items": [{"a": 1}]}'
    async with world.session.get(world.url, params={"limit": "50", "continue": "old"}) as response:
        assert (response.status, await response.json()) == (200, {"items": [{"a": 1}]})


@pytest.mark.parametrize("refused", [0, 1, 2])
async def test_expired_token_is_read_again_once(world, refused):
    world.refused = refused
    if refused == 2:
        with pytest.raises(aiohttp.ClientConnectionError, match="401"):
            await world.session.get(world.url)
    else:
        async with world.session.get(world.url) as response:
            assert response.status == 200
    assert world.tokens == [f"Bearer token-{n + 1}" for n in range(min(refused, 1) + 1)]


async def test_other_errors_are_passed_on(world):
    world.status = 503
    async with world.session.get(world.url) as response:
        assert response.status == 503


async def test_known_changes_are_filtered_out(world):
    def event(type_: str, version: int) -> dict:
        return {"type": type_, "object": {"metadata": {"namespace": "n", "name": "a", "resourceVersion": str(version)}}}

    world.known.add(("n", "a", "6"))
    world.body = lines(event("ADDED", 6), event("MODIFIED", 6), event("MODIFIED", 7), event("DELETED", 6))
    received = await watch(world)
    assert received == [event("ADDED", 6), event("MODIFIED", 7), event("DELETED", 6)]
