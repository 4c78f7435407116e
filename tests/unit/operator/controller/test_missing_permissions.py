"""An operator whose role lacks permissions: it names them, and continues with everything that it may do."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from sailvl_operator.api import names
from sailvl_operator.settings import ApiSettings
from tests.support.apiserver.http import InjectedError
from tests.support.builders.operator import build_document
from tests.support.controller_world import KEY, SETTINGS, running

POLICIES = "networkpolicies"
WITHOUT_POLICIES = replace(SETTINGS, defaults=replace(SETTINGS.defaults, network_policies=False))


def forbid(path_end: str, method: str = "GET") -> InjectedError:
    """Refuse every request to a path, as the API server does without a permission."""
    return InjectedError(method=method, path_end=path_end, status=403, times=10**6)


@asynccontextmanager
async def running_without(*errors: InjectedError, settings=SETTINGS):
    async with running(settings) as world:
        world.api.injected_errors = list(errors)  # before the first request
        yield world


@pytest.mark.parametrize("settings", [SETTINGS, WITHOUT_POLICIES], ids=["with policies", "without policies"])
async def test_runs_start_although_policies_may_not_be_watched(settings, caplog):
    async with running_without(forbid(f"/{POLICIES}"), settings=settings) as world:
        await world.apply(build_document())
        await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
        await world.until(lambda: "not permitted to list networkpolicies in all namespaces" in caplog.text)
        assert "the verbs list and watch on networkpolicies of the API group networking.k8s.io" in caplog.text
        assert world.api.list_names(POLICIES) == ({"demo"} if settings is SETTINGS else set())
        assert not world.owned_objects.find_missing_permissions()
        assert world.owned_objects.is_synced()


async def test_missing_permission_is_logged_once_and_counted(caplog):
    async with running_without(forbid("/services")) as world:
        metric = world.parts.controller._metrics.watch_restarts.labels("services", "forbidden")
        await world.until(lambda: metric._value.get() >= 3)
        assert caplog.text.count("not permitted to list services") == 1
        assert dict(world.owned_objects.ages())["services"] < 5, "the liveness probe doesn't restart the operator"


async def test_run_is_not_reconciled_while_its_jobs_may_not_be_watched():
    async with running_without(forbid("/jobs")) as world:
        await world.apply(build_document())
        await world.until(lambda: world.api.list_objects("events"))
        [event] = world.api.list_objects("events")
        assert event["reason"] == "Forbidden"
        assert event["message"] == (
            "the operator is not permitted to list jobs in all namespaces; grant the operator's role the verbs list "
            "and watch on jobs of the API group batch"
        )
        assert not world.api.list_names("jobs")
        world.api.injected_errors = []
        await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
        assert not world.owned_objects.find_missing_permissions()


async def test_namespace_without_permissions_does_not_hold_up_the_others():
    settings = replace(SETTINGS, api=ApiSettings(namespaces=("team", "other")))
    async with running_without(forbid("/namespaces/other/pods"), settings=settings) as world:
        other = build_document()
        other["metadata"]["namespace"] = "other"
        world.send_event(world.api.put("sailvlruns", other))
        await world.apply(build_document())
        await world.until(lambda: KEY[0] in {job["metadata"]["namespace"] for job in world.api.list_objects("jobs")})
        await world.until(lambda: world.api.list_objects("events"))
        assert {job["metadata"]["namespace"] for job in world.api.list_objects("jobs")} == {"team"}
        [missing] = world.owned_objects.find_missing_permissions()
        assert "pods in namespace other" in missing


async def test_run_starts_although_a_policy_that_is_no_longer_wanted_may_not_be_deleted():
    async with running_without(forbid(f"/{POLICIES}/demo", "DELETE")) as world:
        labels = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: "demo"}
        document = world.api.put("sailvlruns", build_document(network={"policy": "Disabled"}))
        owner = {"kind": names.KIND, "name": "demo", "uid": document["metadata"]["uid"], "controller": True}
        metadata = {"name": "demo", "namespace": "team", "labels": labels, "ownerReferences": [owner]}
        world.api.put(POLICIES, {"metadata": metadata, "spec": {}})
        await world.until(lambda: world.owned_objects.network_policies.get(KEY))
        world.send_event(document, "ADDED")
        await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
