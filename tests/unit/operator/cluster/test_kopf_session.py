"""HTTP session of kopf: what kopf gets of a run, and what becomes of responses that would end kopf."""

from __future__ import annotations

import json
from types import SimpleNamespace

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl_operator.api import names
from sailvl_operator.api.parse import MAX_SPEC_BYTES
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.kopf_session import _convert_event, build_session, decode_run
from sailvl_operator.cluster.resources import RunMeta
from sailvl_operator.cluster.runs import RunStore
from tests.support.apiserver.http import AnonymousConfiguration

IDENTITY = {"namespace": "n", "name": "a", "uid": "u", "resourceVersion": "7"}
RUN = {
    "metadata": IDENTITY | {"generation": 2, "annotations": {names.ANNOTATION_RESTART: "sft"}},
    "spec": {"suspend": True},
    "status": {"conditions": []},
}
"""A run with every kind of field that is read."""
MARKED = RUN | {
    "apiVersion": names.API_VERSION,
    "kind": names.KIND,
    "metadata": RUN["metadata"]
    | {
        "annotations": RUN["metadata"]["annotations"] | {"kopf.zalando.org/last-handled-configuration": "{}"},
        "finalizers": ["kopf.zalando.org/KopfFinalizerMarker"],
        "labels": {f"l{n}": "" for n in range(1000)},
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
        "ownerReferences": [{"kind": "Pod", "name": "p", "uid": "p"}],
    },
}
"""That run with fields that are not read, among them markers of kopf."""
ADDED = {"type": "ADDED", "object": MARKED}
EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
BOOKMARK = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "8"}}}
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
    world = SimpleNamespace(status=200, body=b"{}", tokens=[], refused=0, limits=[], build_body=lambda _: world.body)

    async def answer(request: web.Request) -> web.Response:
        world.tokens.append(request.headers["Authorization"])
        if "continue" in request.query:
            return web.json_response({}, status=410)
        if len(world.tokens) <= world.refused:
            return web.json_response({}, status=401)
        world.limits.append(int(request.query.get("limit", 0)))
        body = world.build_body(world.limits[-1])
        return web.Response(status=world.status, body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/{path}", answer)
    async with TestServer(app) as server:
        world.url, world.other = (str(server.make_url(path)) for path in ("/sailvlruns", "/apis"))
        known = world.known = set()
        async with build_session(Credentials(Rotated(world.url)), lambda *state: state in known) as session:
            world.session = session
            yield world


async def watch(world) -> list[dict]:
    async with world.session.get(world.url, params={"watch": "true"}) as response:
        assert response.status == 200
        text = b"".join([chunk async for chunk in response.content.iter_chunked(1024)])
    events = [json.loads(line) for line in text.splitlines()]
    return [e | {"object": read_back(e["object"])} if "document" in e["object"] else e for e in events]


def read_back(passed: dict) -> dict:
    """Return an object as kopf gets it, with its document decoded."""
    document = decode_run(passed)
    for field in {"spec"} & document.keys():
        document[field] = json.loads(bytes(document[field]))
    return passed | {"document": document}


PASSED = {"metadata": IDENTITY, "document": RUN}
"""The form in which kopf gets `MARKED`."""


def lines(*events: object) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


@pytest.mark.parametrize(
    ("status", "body", "seen"),
    [
        pytest.param(200, lines(ADDED, ADDED), ["ADDED", "ADDED"], id="events"),
        pytest.param(200, lines(ADDED) + lines(ADDED)[:9], ["ADDED"], id="incomplete last line is dropped"),
        pytest.param(200, lines(ADDED, EXPIRED), ["ADDED", EXPIRED], id="expired version is passed on"),
        pytest.param(200, lines(BOOKMARK), ["BOOKMARK"], id="bookmark has its version"),
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
        passed = {"ADDED": PASSED, "BOOKMARK": BOOKMARK["object"] | {"document": BOOKMARK["object"]}}
        passed = {type_: {"type": type_, "object": object_} for type_, object_ in passed.items()}
        assert await watch(world) == [passed.get(event, event) if isinstance(event, str) else event for event in seen]


@pytest.mark.parametrize("path", ["url", "other"])
@pytest.mark.parametrize(
    "body", [pytest.param(b'{"items": [{"a": ', id="truncated"), pytest.param(b"<html>", id="not JSON")]
)
async def test_malformed_response_is_a_failed_connection(world, body, path):
    world.body = body
    with pytest.raises(aiohttp.ClientConnectionError, match="the response is malformed"):
        await world.session.get(getattr(world, path))


async def test_other_responses_are_passed_on_unchanged(world):
    world.body = b'{"groups": [{"a": 1}]}'
    async with world.session.get(world.other) as response:
        assert await response.json() == {"groups": [{"a": 1}]}


async def list_runs(world, **query: str) -> dict:
    async with world.session.get(world.url, params=query) as response:
        assert response.status == 200
        page = await response.json()
    return page | {"items": [read_back(item) for item in page["items"]]}


async def test_list_passes_on_the_fields_that_are_read(world):
    world.body = lines({"metadata": {"resourceVersion": "9", "continue": "c"}, "items": [MARKED, MARKED]})
    page = await list_runs(world, limit="50")
    assert page == {
        "apiVersion": names.API_VERSION,
        "kind": f"{names.KIND}List",
        "metadata": {"resourceVersion": "9", "continue": "c"},
        "items": [PASSED, PASSED],
    }


async def test_spec_that_is_too_large_is_left_out_with_its_size(world):
    spec = {"x": "y" * MAX_SPEC_BYTES}
    world.body = lines({"metadata": {}, "items": [MARKED | {"spec": spec}]})
    [passed] = (await list_runs(world))["items"]
    assert passed["document"] == {
        "metadata": RUN["metadata"],
        "spec_bytes": len(msgspec.json.encode(spec)) + 1,  # with the space that `json` writes
        "status": RUN["status"],
    }
    store = RunStore()
    store.put(passed["document"])
    assert f"has {passed['document']['spec_bytes']} bytes as JSON" in store.get(("n", "a")).problem


async def test_list_whose_continue_token_has_expired_begins_again(world):
    """Otherwise kopf would end the process, as for every error of a list except 429."""
    world.body = lines({"metadata": {"resourceVersion": "9"}, "items": [MARKED]})
    assert (await list_runs(world, limit="50", **{"continue": "old"}))["items"] == [PASSED]


async def test_page_that_is_too_large_is_requested_again_with_fewer_runs(world, monkeypatch):
    max_bytes = 10 * len(lines(MARKED))
    monkeypatch.setattr("sailvl_operator.cluster.page_limit.MAX_PAGE_BYTES", max_bytes)
    wide = MARKED | {"metadata": MARKED["metadata"] | {"annotations": {"wide": "x" * (max_bytes // 20)}}}
    world.build_body = lambda limit: lines({"metadata": {"resourceVersion": "9"}, "items": [wide] * limit})
    page = await list_runs(world, limit="50")
    assert (len(page["items"]), world.limits) == (6, [50, 6])
    world.build_body = lambda limit: lines({"metadata": {"resourceVersion": "9"}, "items": [RUN] * limit})
    assert [len((await list_runs(world, limit="50"))["items"]) for _ in range(5)] == [6, 12, 24, 48, 50]


@pytest.mark.parametrize("refused", [0, 1, 2])
async def test_expired_token_is_read_again_once(world, refused):
    world.refused = refused
    if refused == 2:
        with pytest.raises(aiohttp.ClientConnectionError, match="401"):
            await world.session.get(world.other)
    else:
        async with world.session.get(world.other) as response:
            assert response.status == 200
    assert world.tokens == [f"Bearer token-{n + 1}" for n in range(min(refused, 1) + 1)]


async def test_other_errors_are_passed_on(world):
    world.status = 503
    async with world.session.get(world.url) as response:
        assert response.status == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(fields=st.dictionaries(st.text().filter(lambda name: name not in RunMeta.__annotations__), JSON))
@settings(max_examples=50, deadline=None)
def test_no_other_metadata_reaches_kopf_or_is_held(fields):
    wide = RUN | {"metadata": RUN["metadata"] | fields}
    [expected], [line] = (lines({"type": "ADDED", "object": run}).splitlines() for run in (RUN, wide))
    assert _convert_event(line, lambda *_: False) == _convert_event(expected, lambda *_: False)


async def test_known_changes_are_filtered_out(world):
    def event(type_: str, version: int) -> dict:
        return {"type": type_, "object": {"metadata": IDENTITY | {"resourceVersion": str(version)}}}

    world.known.add(("n", "a", "6"))
    world.body = lines(event("ADDED", 6), event("MODIFIED", 6), event("MODIFIED", 7), event("DELETED", 6))
    received = [(e["type"], e["object"]["metadata"]["resourceVersion"]) for e in await watch(world)]
    assert received == [("ADDED", "6"), ("MODIFIED", "7"), ("DELETED", "6")]
