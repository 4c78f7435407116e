"""Lists whose objects are as large as the API server allows."""

from __future__ import annotations

import tracemalloc
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.api import names
from sailvl_operator.cluster import page_limit, resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.core.observe import JobRecord, NetworkPolicyRecord, PodRecord
from tests.support.apiserver.http import AnonymousConfiguration

MIB = 2**20
OWNER = {"apiVersion": "v1", "kind": "A", "name": "a", "uid": "u"}
LARGE_FIELDS = {
    "pods": {"metadata": {"ownerReferences": [OWNER] * 22_000}},
    "jobs": {"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "b"}] * 45_000}}}},
    "networkpolicies": {"spec": {"podSelector": {}, "ingress": [{}] * 480_000}},
}
"""Fields that a tenant may fill, by resource; each makes an object of about 1.4 MiB."""


def encode_object(fields: dict) -> bytes:
    """Encode an object of the run `demo` with some fields of its own."""
    labels = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: "demo"}
    metadata = {"name": "NAME", "namespace": "team", "uid": "NAME", "resourceVersion": "1", "labels": labels}
    return msgspec.json.encode(fields | {"metadata": metadata | fields.get("metadata", {})})


class LargeObjects:
    """An API server that sends copies of one object, without holding more than one of them."""

    def __init__(self, numbers: dict[bytes, int]) -> None:
        self._objects = [content for content, number in numbers.items() for _ in range(number)]
        self.limits: list[int] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a list request; any watch stays silent."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        start, limit = int(request.query.get("continue") or 0), int(request.query["limit"])
        self.limits.append(limit)
        end = min(start + limit, len(self._objects))
        token = {"continue": str(end)} if end < len(self._objects) else {}
        await response.write(b'{"metadata":%s,"items":[' % msgspec.json.encode({"resourceVersion": "1", **token}))
        for number in range(start, end):
            name = str(number).encode()
            await response.write((b"" if number == start else b",") + self._objects[number].replace(b"NAME", name))
        await response.write(b"]}")
        return response


@asynccontextmanager
async def connected_to(server: LargeObjects):
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    async with (
        TestServer(app) as running,
        Client(Credentials(AnonymousConfiguration(str(running.make_url("/")).rstrip("/")))) as client,
    ):
        yield client


async def list_into_store(client: Client, resource: str) -> list[JobRecord | PodRecord | NetworkPolicyRecord]:
    """List a resource as its informer does and return the records."""
    objects = OwnedObjects(client, namespaces=(), on_change=lambda _: None, count_restart=lambda *_: None)
    informer = next(i for i in objects._informers if i.resource == resource)
    await informer._list()
    return list(informer._store)


@pytest.mark.slow
@pytest.mark.parametrize("resource", LARGE_FIELDS)
async def test_memory_does_not_grow_with_the_number_of_large_objects(resource, monkeypatch):
    monkeypatch.setattr(page_limit, "MAX_PAGE_BYTES", 4 * MIB)
    server = LargeObjects({encode_object(LARGE_FIELDS[resource]): 8})
    async with connected_to(server) as client:
        tracemalloc.start()
        try:
            records = await list_into_store(client, resource)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len({record.uid for record in records}) == 8
    assert peak < 24 * MIB


async def test_fewer_objects_are_requested_while_they_are_large():
    small, large = encode_object({}), encode_object({"spec": {"x": "x" * MIB}})
    server = LargeObjects({small: 700, large: 20, small + b" ": 1500})
    async with connected_to(server) as client:
        sizes = [len(list(page.items)) async for page in client.list_pages(resources.PODS)]
    assert sum(sizes) == 2220, "none is missing or sent twice"
    assert server.limits[:2] == [500, 500], "small objects come in full pages"
    assert sizes[0] == 500
    assert min(sizes[1:-1]) <= 7
    assert server.limits[-1] == 500, "and again once the large ones are over"


async def test_single_object_is_read_whatever_its_size():
    server = LargeObjects({encode_object({"spec": {"x": "x" * (page_limit.MAX_PAGE_BYTES + 1)}}): 2})
    async with connected_to(server) as client:
        assert [len(list(page.items)) async for page in client.list_pages(resources.PODS)] == [1, 1]


@pytest.mark.parametrize("resource", [resources.PODS, resources.SERVICES], ids=lambda resource: resource.plural)
async def test_typical_objects_take_one_request_per_full_page(resource: Resource):
    server = LargeObjects({encode_object({"spec": {"x": "x" * 8_000}}): 1000})
    async with connected_to(server) as client:
        assert [len(list(page.items)) async for page in client.list_pages(resource)] == [500, 500]
    assert server.limits == [500, 500]
