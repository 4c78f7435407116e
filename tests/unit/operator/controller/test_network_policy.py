"""The NetworkPolicy of a run on an API server: written before its first Job, and kept as it should be."""

from __future__ import annotations

from typing import Any

import pytest

from sailvl_operator.api.status import Reason
from tests.support.apiserver.http import InjectedError
from tests.support.builders.operator import build_document
from tests.support.controller_world import KEY, ControllerWorld, running

POLICIES = "networkpolicies"


@pytest.fixture
async def world():
    async with running() as world:
        yield world


def build_spec(uid: str) -> dict[str, Any]:
    """Return the spec of the policy of an operator without metrics peers."""
    workers = {"matchLabels": {"sailvl.dev/run": "demo", "sailvl.dev/run-uid": uid}}
    return {"podSelector": workers, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": workers}]}]}


def list_writes(world: ControllerWorld) -> list[tuple[str, str]]:
    """Return the method and the resource of every write to policies and Jobs."""
    return [
        (method, path.split("/")[-1 if method == "POST" else -2])
        for method, path in world.api.list_writes()
        if f"/{POLICIES}" in path or "/jobs" in path
    ]


async def start(world: ControllerWorld) -> str:
    """Create a run, wait for its first Job and return the run's UID."""
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    return str(world.run["metadata"]["uid"])


def get_spec(world: ControllerWorld) -> dict[str, Any]:
    policy = world.api.objects.get(POLICIES, {}).get(KEY)
    return policy["spec"] if policy is not None else {}


def edit_policy(world: ControllerWorld, **changes: Any) -> None:
    """Change fields of the policy's spec, as a user does."""
    policy = world.api.objects[POLICIES][KEY]
    world.api.put(POLICIES, policy | {"spec": policy["spec"] | changes})


async def test_one_policy_is_written_before_the_first_job(world):
    uid = await start(world)
    assert list_writes(world) == [("POST", POLICIES), ("POST", "jobs")]
    assert get_spec(world) == build_spec(uid)
    [owner] = world.api.objects[POLICIES][KEY]["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (uid, True)


async def test_deleted_policy_is_created_again(world):
    uid = await start(world)
    world.api.remove_named(POLICIES, "demo")
    await world.until(lambda: get_spec(world) == build_spec(uid))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ingress": [{}]}, id="admits everyone"),
        pytest.param({"podSelector": {"matchLabels": {"app": "other"}}}, id="selects other pods"),
        pytest.param({"egress": [{}], "policyTypes": ["Ingress", "Egress"]}, id="additional fields"),
        pytest.param({"ingress": [{}] * 1000}, id="more rules than are decoded"),
        pytest.param({"podSelector": {"matchLabels": {f"k{i}": "" for i in range(100)}}}, id="labels not decoded"),
    ],
)
async def test_edited_policy_is_restored(world, changes):
    uid = await start(world)
    edit_policy(world, **changes)
    await world.until(lambda: get_spec(world) == build_spec(uid))


async def test_policy_that_lost_its_labels_is_restored_in_place(world):
    uid = await start(world)
    policy = world.api.objects[POLICIES][KEY]
    world.api.put(POLICIES, policy | {"metadata": policy["metadata"] | {"labels": {}}})
    world.owned_objects.network_policies.delete(policy)  # as the watch reports an object that leaves its selector
    await world.until(lambda: world.api.objects[POLICIES][KEY]["metadata"]["labels"])
    await world.until_idle()
    assert get_spec(world) == build_spec(uid)
    assert world.owned_objects.network_policies.get(KEY)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
async def test_refused_update_of_the_policy_makes_the_run_stuck(world, status):
    await start(world)
    world.api.injected_errors = [InjectedError(method="PATCH", path_end=f"/{POLICIES}/demo", status=status, times=1000)]
    edit_policy(world, ingress=[{}])
    await world.until(lambda: world.status.is_true("Stuck"))
    assert world.status.condition("Stuck").reason == Reason.REJECTED


async def test_disabling_the_policy_deletes_it_and_enabling_creates_it(world):
    uid = await start(world)
    await world.apply(build_document(network={"policy": "Disabled"}))
    await world.until(lambda: not get_spec(world))
    await world.until_idle()
    assert not get_spec(world)
    await world.apply(build_document())
    await world.until(lambda: get_spec(world) == build_spec(uid))


async def test_run_with_disabled_policy_gets_none(world):
    await world.apply(build_document(network={"policy": "Disabled"}))
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    assert list_writes(world) == [("POST", "jobs")]


async def test_foreign_policy_of_the_same_name_is_kept_and_no_worker_starts(world):
    spec = {"podSelector": {}, "policyTypes": ["Ingress"]}
    world.api.put(POLICIES, {"metadata": {"name": "demo", "namespace": "team", "labels": {}}, "spec": spec})
    await world.apply(build_document())
    await world.until(lambda: world.status.is_true("Stuck"))
    stuck = world.status.condition("Stuck")
    assert (stuck.reason, stuck.message) == (
        Reason.NAME_CONFLICT,
        "NetworkPolicy demo exists and is not owned by this run; delete it or rename the run",
    )
    assert (get_spec(world), world.api.list_names("jobs")) == (spec, set())
    world.api.remove_named(POLICIES, "demo")
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})


@pytest.mark.parametrize("status", [400, 403, 413, 418, 422])
async def test_no_worker_starts_while_the_policy_is_refused(world, status):
    """The code of a denial is chosen by the admission webhook."""
    world.api.injected_errors = [InjectedError(method="POST", path_end=f"/{POLICIES}", status=status, times=1000)]
    await world.apply(build_document())
    await world.until(lambda: world.status.is_true("Stuck"))
    stuck = world.status.condition("Stuck")
    assert stuck.reason == Reason.REJECTED
    assert stuck.message.endswith(f"/namespaces/team/{POLICIES}: Injected")
    assert world.api.list_names("jobs") == set()
    world.api.injected_errors = []
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
