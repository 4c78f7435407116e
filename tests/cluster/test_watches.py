"""Watches of a real API server, decoded to the fields that the operator reads."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.cluster.resources import Resource
from tests.support.builders.operator import build_document

pytestmark = pytest.mark.cluster


TEMPLATE = {"spec": {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "none"}]}}
UNSCHEDULABLE = TEMPLATE["spec"] | {"nodeSelector": {"sailvl.dev/there-is": "none"}}


@pytest.mark.parametrize(
    ("resource", "decode_as", "body"),
    [
        pytest.param(resources.JOBS, resources.Job, {"spec": {"suspend": True, "template": TEMPLATE}}, id="jobs"),
        pytest.param(resources.PODS, resources.Pod, {"spec": UNSCHEDULABLE}, id="pods"),
        pytest.param(resources.SERVICES, resources.Service, {"spec": {"clusterIP": "None"}}, id="services"),
        pytest.param(
            resources.NETWORK_POLICIES, resources.NetworkPolicy, {"spec": {"podSelector": {}}}, id="network policies"
        ),
        pytest.param(resources.RUNS, dict, build_document(suspend=True), id="runs"),
    ],
)
async def test_bookmarks_advance_watch_without_events(
    kubeconfig: str, resource: Resource, decode_as: Any, body: dict[str, Any]
) -> None:
    """The API server sends one before the end of a watch, and once a minute, while objects of the kind change."""
    async with Client(load_credentials(kubeconfig, ""), ClientConfig(watch_timeout_seconds=4)) as client:
        created = await client.create(resource, "default", body | {"metadata": {"name": "unselected"}})
        version = created["metadata"]["resourceVersion"]
        changing = asyncio.create_task(keep_changing(client, resource))
        try:
            selector = "sailvl.dev/run=none"
            watch = client.watch(resource, selector=selector, resource_version=version, decode_as=decode_as)
            events = [(type_, int(raw["metadata"]["resourceVersion"])) async for type_, raw in watch]
        finally:
            changing.cancel()
            await client.delete(resource, "default", "unselected", uid=created["metadata"]["uid"])
    assert {type_ for type_, _ in events} == {"BOOKMARK"}
    assert events[-1][1] > int(version)


async def keep_changing(client: Client, resource: Resource) -> None:
    for number in count():
        patch = {"metadata": {"annotations": {"number": str(number)}}}
        await client.patch(resource, "default", "unselected", patch)
        await asyncio.sleep(0.2)
