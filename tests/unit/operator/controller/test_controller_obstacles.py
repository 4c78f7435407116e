"""The controller with failing and refused writes, objects of others, attempts that don't start, and stale events."""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sailvl_operator.api import names
from sailvl_operator.api.status import decode_status
from sailvl_operator.run_series import RunCollector
from tests.support.apiserver.http import InjectedError
from tests.support.builders.operator import build_document
from tests.support.controller_world import KEY, ControllerWorld, build_two_worker_document, make_pod, running


@pytest.fixture
async def world():
    async with running() as world:
        yield world


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(InjectedError(method="POST", path_end="/jobs", status=500, times=6), id="Job"),
        pytest.param(InjectedError(method="POST", path_end="/services", status=403, times=2), id="Service"),
        pytest.param(InjectedError(method="PATCH", path_end="/status", status=409, times=2), id="status, conflict"),
        pytest.param(InjectedError(method="PATCH", path_end="/status", status=503, times=6), id="status"),
    ],
)
async def test_failed_write_is_repeated(world, refusal):
    world.api.injected_errors = [refusal]
    await world.apply(build_two_worker_document())
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
    await world.until(lambda: world.api.list_names("services") == {"demo"})
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    assert world.states()["curate"] == ("Starting", 1)


@pytest.mark.parametrize("resource", ["jobs", "services", "persistentvolumeclaims"])
@pytest.mark.parametrize("status", [400, 413])
async def test_refusal_of_any_object_makes_the_run_stuck_with_the_message(world, resource, status):
    world.api.injected_errors = [InjectedError(method="POST", path_end=f"/{resource}", status=status, times=1000)]
    document = build_two_worker_document()
    document["spec"]["storage"] = {"volumeClaimTemplate": {"resources": {"requests": {"storage": "1Gi"}}}}
    await world.apply(document)
    await world.until(lambda: world.status.is_true("Stuck"))
    assert world.status.condition("Stuck").message.endswith(f"/namespaces/team/{resource}: Injected")
    world.api.injected_errors = []
    await world.until(lambda: not world.status.is_true("Stuck"))
    assert world.api.list_names("jobs") == {"demo-curate-1"}


async def test_refused_job_does_not_block_other_writes(world):
    """The quota may be used up by the Job of the failed attempt, which must still be deleted."""
    await world.apply(build_document(restartPolicy={"maxInfraRestarts": 100}))
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"][0] == "Running")
    world.api.injected_errors = [InjectedError(method="POST", path_end="/jobs", status=403, times=1000)]
    await world.end_pod("curate", 1, 0, 76)
    await world.until(lambda: not world.api.list_names("jobs"))
    await world.until(lambda: world.status.is_true("Stuck"))
    world.api.injected_errors = []
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})


async def test_second_controller_creates_no_duplicates(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.until_idle()
    other = ControllerWorld(world.api, world.client)
    tasks = [asyncio.create_task(part) for part in (other.owned_objects.run(), other.controller.run(2))]
    other.send_event(world.run)
    await other.until_idle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert world.api.list_names("jobs") == {"demo-curate-1"}
    assert world.states()["curate"] == ("Starting", 1)


async def test_job_of_a_deleted_run_with_the_same_name_is_not_adopted(world):
    old = {"metadata": {"name": "demo-curate-1", "ownerReferences": [{"uid": "old-run"}]}, "spec": {}}
    world.api.put("jobs", old)
    await world.apply(build_document())
    await world.until(lambda: any(e["reason"] == "NameConflict" for e in world.api.list_objects("events")))
    assert "is not owned by this run" in world.status.condition("Stuck").message
    assert world.api.list_objects("jobs")[0]["metadata"]["ownerReferences"] == [{"uid": "old-run"}]
    world.api.remove_named("jobs", "demo-curate-1")
    await world.until(lambda: world.api.list_names("jobs"))
    [job] = world.api.list_objects("jobs")
    assert job["metadata"]["ownerReferences"][0]["uid"] == world.run["metadata"]["uid"]
    await world.until(lambda: not world.status.is_true("Stuck"))


async def test_pods_of_a_deleted_run_with_the_same_name_are_ignored(world):
    """They may even be younger than the run, if the operator learned late of the deletion."""
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    stranger = make_pod("evaluate", 1, 0, "Running", job_uid="old-job")
    stranger["metadata"]["labels"][names.LABEL_RUN_UID] = "old-run"
    world.api.put("pods", stranger)
    await world.until_idle()
    assert world.states()["evaluate"] == ("Pending", 0)


async def report_and_diagnose(world, plural: str, **fields: Any) -> None:
    """Report why the first attempt doesn't start, and let the controller diagnose it."""
    await world.apply(build_document(**fields.pop("spec", {})))
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    job = world.api.list_objects("jobs")[0]["metadata"]
    world.api.put(plural, fields["build_report"](job))
    await world.diagnostics.diagnose_waiting()
    await world.until_idle()


def make_warning(uid: str, reason: str, message: str) -> dict[str, Any]:
    about = {"type": "Warning", "involvedObject": {"uid": uid}, "lastTimestamp": "2026-01-01T00:00:00Z"}
    return about | {"metadata": {"name": f"{uid}.1"}, "reason": reason, "message": message}


async def test_stuck_shows_why_pods_cannot_be_created(world):
    message = 'pods "demo-curate-1-0" is forbidden: exceeded quota: gpus'
    await report_and_diagnose(
        world, "events", build_report=lambda job: make_warning(job["uid"], "FailedCreate", message)
    )
    stuck = world.status.condition("Stuck")
    assert (stuck.reason, stuck.message) == ("QuotaExceeded", f"Job demo-curate-1: FailedCreate: {message}")
    await world.add_pods("curate")
    await world.until(lambda: not world.status.is_true("Stuck"))


async def test_stuck_shows_a_failed_mount(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    pod = world.add_pod("curate", 1, 0, "Pending")
    world.api.put("events", make_warning(pod["metadata"]["uid"], "FailedMount", "volume x is gone"))
    await world.until(lambda: world.owned_objects.pods.get(KEY))
    await world.diagnostics.diagnose_waiting()
    await world.until(lambda: world.status.is_true("Stuck"))
    assert world.status.condition("Stuck").reason == "VolumeNotReady"


async def test_stuck_shows_why_kueue_does_not_admit_the_job(world):
    def workload(job: dict[str, Any]) -> dict[str, Any]:
        held = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
        labels = {"kueue.x-k8s.io/job-uid": job["uid"]}
        return {"metadata": {"name": "w", "labels": labels}, "status": {"conditions": [held]}}

    workers = {"nodes": 1, "gpusPerNode": 8, "queueName": "team"}
    await report_and_diagnose(world, "workloads", spec={"workers": workers}, build_report=workload)
    stuck = world.status.condition("Stuck")
    assert (stuck.reason, stuck.message) == (
        "Queued",
        "Kueue's queue team: insufficient unused quota for nvidia.com/gpu",
    )


async def test_deleted_run_is_forgotten(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.add_pods("curate")
    await world.until_idle()
    raw = world.run
    world.api.remove_named("sailvlruns", "demo")
    world.send_event(raw, "DELETED")
    world.api.remove_named("jobs", "demo-curate-1")
    world.api.remove_named("pods", "demo-curate-1-0-x")
    await world.until(lambda: not list(world.owned_objects.pods) and not list(world.owned_objects.jobs))
    assert len(world.runs) == 0


async def test_stale_event_changes_nothing(world):
    await world.apply(build_document())
    first = copy.deepcopy(world.run)
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    before = len(world.api.list_writes())
    world.send_event(first)
    await world.until_idle()
    assert world.api.list_writes()[before:] == []
    assert int(world.runs.get(KEY).run.resource_version) == int(world.run["metadata"]["resourceVersion"])


async def test_metrics_of_a_deleted_run_disappear(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    registry = CollectorRegistry()
    registry.register(RunCollector(lambda: [(*KEY, partial(decode_status, e.run.status)) for e in world.runs]))
    text = generate_latest(registry).decode()
    assert 'sailvl_run_stage_state{namespace="team",run="demo",stage="curate",state="starting"} 1.0' in text
    assert 'sailvl_runs{state="pending"} 1.0' in text
    world.send_event(world.run, "DELETED")
    assert 'run="demo"' not in generate_latest(registry).decode()
