"""Objects that a tenant creates with a run's labels and owner, and edits of the run's own objects."""

from __future__ import annotations

import copy
import tracemalloc
from typing import Any

import pytest

from sailvl_operator.api import names
from tests.support.builders.operator import build_document, build_result
from tests.support.controller_world import KEY, make_pod, running


@pytest.fixture
async def world():
    async with running() as world:
        yield world


def forge_job(world, name: str, *, spec: dict[str, Any], manager: str = names.FIELD_MANAGER) -> dict[str, Any]:
    """Create a Job of the run's first attempt as a tenant can: owned by the run, with the labels of the operator."""
    labels = {
        names.LABEL_MANAGED_BY: manager,
        names.LABEL_RUN: "demo",
        names.LABEL_STAGE: "curate",
        names.LABEL_ATTEMPT: "1",
    }
    owner = {"kind": names.KIND, "name": "demo", "uid": world.run["metadata"]["uid"], "controller": True}
    metadata = {"name": name, "namespace": "team", "labels": labels, "ownerReferences": [owner]}
    return world.api.put("jobs", {"metadata": metadata, "spec": spec})


async def start(world) -> None:
    """Apply the run, and wait until the pod of its first attempt runs."""
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"] == ("Running", 1))


@pytest.mark.parametrize("mode", ["NonIndexed", "Indexed"])
async def test_job_of_another_name_with_huge_completions_changes_nothing(world, mode):
    await start(world)
    tracemalloc.start()
    try:
        number = 3_000_000
        forge_job(world, "forged", spec={"completionMode": mode, "completions": number, "parallelism": number})
        await world.until(lambda: len(world.owned_objects.jobs.get(KEY)) == 2)
        await world.until_idle()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert world.states()["curate"] == ("Running", 1)
    assert peak < 8 * 2**20
    await world.end_pod("curate", 1, 0, 0, result=build_result("curate"))
    await world.until(lambda: world.states()["curate"][0] == "Succeeded")
    assert "forged" in world.api.list_names("jobs"), "the operator leaves it alone"


async def test_forged_first_job_is_replaced(world):
    document = world.api.put("sailvlruns", build_document())
    forge_job(world, "demo-curate-1", spec={"completions": 10**6, "parallelism": 10**6})
    await world.until(lambda: world.owned_objects.jobs.get(KEY))
    world.send_event(document, "ADDED")
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    await world.until_idle()
    assert world.states()["curate"] == ("Restarting", 2)
    message = "Job demo-curate-1 was altered: completionMode is NonIndexed, not Indexed"
    assert world.status.stages[0].last_failure.message == message


async def test_job_that_the_operator_cannot_watch_is_a_name_conflict_until_it_is_deleted(world):
    document = world.api.put("sailvlruns", build_document())
    spec = {"completionMode": "Indexed", "completions": 1, "parallelism": 1}
    forge_job(world, "demo-curate-1", spec=spec, manager="me")
    world.send_event(document, "ADDED")
    await world.until(lambda: world.status.is_true("Stuck"))
    stuck = world.status.condition("Stuck")
    assert stuck.reason == "NameConflict"
    assert (
        "Job demo-curate-1 exists, but differs from the one that this run creates: it lacks the label" in stuck.message
    )
    world.api.remove_named("jobs", "demo-curate-1")
    await world.until(lambda: not world.status.is_true("Stuck"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"completions": 2}, "completions is 2 and parallelism 1", id="completions"),
        pytest.param({"parallelism": 0}, "completions is 1 and parallelism 0", id="parallelism"),
    ],
)
async def test_edited_job_is_replaced_by_the_next_attempt(world, change, message):
    await start(world)
    job = copy.deepcopy(world.api.objects["jobs"]["team", "demo-curate-1"])
    job["spec"] |= change
    world.api.put("jobs", job)
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    await world.until_idle()
    last = world.status.stages[0].last_failure
    assert (last.cause, message in last.message) == ("Infra", True)


async def test_job_whose_owner_was_removed_is_not_the_runs_any_more(world):
    await start(world)
    job = copy.deepcopy(world.api.objects["jobs"]["team", "demo-curate-1"])
    job["metadata"]["ownerReferences"] = []
    world.api.put("jobs", job)
    await world.until(lambda: "demo-curate-2" in world.api.list_names("jobs"))
    assert "owner was changed" in world.status.stages[0].last_failure.message


async def test_pods_with_a_result_that_no_job_created_are_not_believed(world):
    await start(world)
    pod = make_pod("curate", 1, 0, "Succeeded", job_uid="forged")
    pod["metadata"]["name"] = "demo-curate-1-0-forged"
    termination = '{"exit_code": 0, "result": {"output": "../.."}}'
    ended = {"name": names.CONTAINER, "state": {"terminated": {"exitCode": 0, "message": termination}}}
    pod["status"]["containerStatuses"] = [ended]
    world.api.put("pods", pod)
    await world.until(lambda: len(world.owned_objects.pods.get(KEY)) == 2)
    await world.until_idle()
    assert world.states()["curate"] == ("Running", 1)


def forge_pod(number: int, job: dict[str, Any], **labels: str) -> dict[str, Any]:
    """Build a failed pod as a tenant can create it: with the labels of the run's worker, and owned by its Job."""
    pod = make_pod("curate", 1, 0, "Failed", job_uid=job["metadata"]["uid"])
    pod["metadata"] |= {"name": f"demo-curate-1-0-forged{number}", "labels": pod["metadata"]["labels"] | labels}
    return pod


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({}, id="as the worker's"),
        pytest.param({names.LABEL_ATTEMPT: "999"}, id="later attempt"),
        pytest.param({names.LABEL_COMPLETION_INDEX: "1"}, id="other index"),
        pytest.param({names.LABEL_STAGE: "other"}, id="other stage"),
        pytest.param({names.LABEL_RUN: "other"}, id="other run"),
    ],
)
async def test_deleted_forged_pods_do_not_accumulate(world, labels):
    await start(world)
    store, run = world.owned_objects.pods, labels.get(names.LABEL_RUN, "demo")
    for number in range(30):
        raw = world.api.put("pods", forge_pod(number, world.api.objects["jobs"]["team", "demo-curate-1"], **labels))
        store.put_watched(raw)
        store.delete(raw)
    assert len([pod for pod in store.get(("team", run)) if pod.is_gone]) <= 2


async def test_deleted_forged_jobs_do_not_accumulate(world):
    await start(world)
    store = world.owned_objects.jobs
    for attempt in range(1, 31):
        raw = forge_job(world, f"demo-curate-{attempt}", spec={"completions": 1})
        raw["metadata"] |= {"uid": f"forged-{attempt}"}
        store.put_watched(raw)
        store.delete(raw)
    assert len([job for job in store.get(KEY) if job.is_gone]) <= 1
