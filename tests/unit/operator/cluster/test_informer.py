"""The informer against an API server whose watches end, expire and miss events."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sailvl_operator.api import names
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.parse import parse_job
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve

KEY = ("team", "demo")


def make_pod(name: str, *, run: str = "demo", index: int = 0, phase: str = "Running", **status: object) -> dict:
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_RUN: run,
        names.LABEL_STAGE: "curate",
        names.LABEL_ATTEMPT: "1",
        names.LABEL_COMPLETION_INDEX: str(index),
    }
    return {"metadata": {"name": name, "namespace": "team", "labels": labels}, "status": {"phase": phase, **status}}


@asynccontextmanager
async def watching(*namespaces: str, pods: int = 0, is_leading: bool = True):
    api, changes, restarts = FakeApiServer(), [], []
    for i in range(pods):
        api.put("pods", make_pod(f"p{i}", index=i))
    async with (
        serve(api) as url,
        Client(Credentials(AnonymousConfiguration(url)), ClientConfig(page_size=2)) as client,
    ):
        owned_objects = OwnedObjects(
            client,
            namespaces=namespaces,
            on_change=changes.append,
            count_restart=lambda resource, cause: restarts.append((resource, cause)),
        )
        task = asyncio.create_task(owned_objects.run())
        try:
            async with asyncio.timeout(10):
                await owned_objects.wait_synced()
                await until(lambda: api.open_watches == 4 * max(1, len(namespaces)))
                if is_leading:
                    owned_objects.retain_deleted()
                yield SimpleNamespace(api=api, owned_objects=owned_objects, changes=changes, restarts=restarts)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def pods(world) -> dict[str, bool]:
    """Return the stored pods of the run, and whether they are deleted."""
    return {p.name: p.is_gone for p in world.owned_objects.pods.get(KEY)}


async def test_informer_lists_all_pages_and_then_watches():
    async with watching(pods=5) as world:
        assert pods(world) == {f"p{i}": False for i in range(5)}
        assert set(world.changes) == {KEY}
        world.api.put("pods", make_pod("p5", index=5))
        await until(lambda: len(pods(world)) == 6)


async def test_last_state_of_a_deleted_pod_is_kept_until_it_is_forgotten():
    ended = {"containerStatuses": [{"name": "worker", "state": {"terminated": {"exitCode": 64, "message": "why"}}}]}
    async with watching(pods=1) as world:
        world.api.put("pods", make_pod("p0", phase="Failed", **ended))
        world.api.remove_named("pods", "p0")
        await until(lambda: pods(world) == {"p0": True})
        [pod] = world.owned_objects.pods.get(KEY)
        assert (pod.phase, pod.terminated.exit_code, pod.terminated.message) == ("Failed", 64, "why")
        world.owned_objects.pods.forget(KEY, lambda pod: pod.attempt > 1)
        assert pods(world) == {"p0": True}
        world.owned_objects.pods.forget(KEY, lambda pod: pod.attempt == 1)
        assert pods(world) == {}


async def test_missed_changes_are_found_by_the_next_list():
    async with watching(pods=3) as world:
        del world.api.objects["pods"]["team", "p1"]
        world.api.put("pods", make_pod("p9", index=9))
        world.api.compact()
        world.api.break_watches()
        await until(lambda: ("pods", "expired") in world.restarts or pods(world).get("p1"))
        await until(lambda: pods(world) == {"p0": False, "p1": True, "p2": False, "p9": False})


async def test_ended_watch_is_resumed_without_a_list():
    async with watching(pods=1) as world:
        lists = sum("watch" not in query for _, _, query, _ in world.api.requests)
        world.api.break_watches()
        world.api.put("pods", make_pod("p1", index=1))
        await until(lambda: len(pods(world)) == 2)
        assert sum("watch" not in query for _, _, query, _ in world.api.requests) == lists
        assert ("pods", "timeout") in world.restarts


async def test_late_response_does_not_restore_a_deleted_job():
    labels = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: "demo", names.LABEL_STAGE: "curate"}
    async with watching() as world:
        job = world.api.put("jobs", {"metadata": {"name": "j", "labels": labels}, "spec": {}})
        await until(lambda: world.owned_objects.jobs.get(KEY))
        world.api.remove_named("jobs", "j")
        await until(lambda: world.owned_objects.jobs.get(KEY)[0].is_gone)
        world.owned_objects.jobs.put_created(job)
        world.owned_objects.jobs.put(job)
        assert [found.is_gone for found in world.owned_objects.jobs.get(KEY)] == [True]
        world.owned_objects.jobs.forget(KEY, lambda _: True)
        assert world.owned_objects.jobs.get(KEY) == []


async def test_standby_does_not_keep_deleted_pods():
    async with watching(pods=2, is_leading=False) as world:
        world.api.remove_named("pods", "p0")
        await until(lambda: pods(world) == {"p1": False})


def test_object_created_during_a_list_is_kept():
    labels = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: "demo"}
    jobs = [{"metadata": {"name": n, "uid": n, "namespace": "team", "labels": labels}, "spec": {}} for n in "abc"]
    store = OwnedObjects(Any, namespaces=(), on_change=lambda _: None, count_restart=lambda *_: None).jobs
    store.retains_deleted = True
    for job in jobs[:2]:
        store.put(job)
    known = store.uids("")
    store.put_created(jobs[2])  # created while the list request is in flight
    store.replace_all([parse_job(jobs[0])], namespace="", known=known)
    assert {job.name: job.is_gone for job in store.get(KEY)} == {"a": False, "b": True, "c": False}


async def test_only_the_given_namespaces_are_watched():
    async with watching("team", "other") as world:
        for namespace in ("team", "other", "third"):
            pod = make_pod("p")
            pod["metadata"]["namespace"] = namespace
            world.api.put("pods", pod)
        await until(lambda: len(list(world.owned_objects.pods)) == 2)
        assert {p.namespace for p in world.owned_objects.pods} == {"team", "other"}


async def test_ages_grow_while_no_data_arrives():
    async with watching() as world:
        await asyncio.sleep(0.1)
        ages = dict(world.owned_objects.ages())
        assert ages.keys() == {"jobs", "pods", "services", "networkpolicies"}
        assert all(age >= 0.1 for age in ages.values())


@pytest.mark.parametrize("same", [True, False], ids=["irrelevant change", "relevant change"])
async def test_only_changes_of_the_record_are_reported(same):
    async with watching(pods=1) as world:
        await until(lambda: world.changes)
        world.changes.clear()
        world.api.put("pods", make_pod("p0", phase="Running" if same else "Failed"))
        world.api.put("pods", make_pod("x", run="other"))
        await until(lambda: ("team", "other") in world.changes)
        assert (KEY in world.changes) is not same


async def test_object_whose_label_names_another_run_is_gone_for_the_first_one():
    async with watching(pods=1) as world:
        world.api.put("pods", make_pod("p0", run="other"))
        await until(lambda: world.owned_objects.pods.get(("team", "other")))
        assert pods(world) == {"p0": True}
        world.owned_objects.pods.forget(KEY, lambda _: True)
        world.api.remove_named("pods", "p0")
        await until(lambda: world.owned_objects.pods.get(("team", "other"))[0].is_gone)
        assert pods(world) == {}
