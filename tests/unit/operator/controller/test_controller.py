"""The controller against an API server: whole runs, failing writes, and stale observations."""

from __future__ import annotations

import asyncio
import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sailvl_operator.api import names
from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.status import ConditionType, decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.run_series import RunCollector
from sailvl_trainer.contract import Env
from tests.support.apiserver.http import InjectedError
from tests.support.builders.operator import build_document, build_result
from tests.support.controller_world import KEY, SETTINGS, ControllerWorld, make_pod, running


@pytest.fixture
async def world():
    async with running() as world:
        yield world


def spread() -> dict[str, Any]:
    """Build a valid run with two workers in its first stage."""
    document = build_document()
    document["spec"]["stages"][0]["workers"] = {"nodes": 2}
    return document


async def test_first_job_and_service_are_created(world):
    await world.apply(spread())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.until_idle()
    assert world.api.list_names("jobs") == {"demo-curate-1"}
    assert world.api.list_names("services") == {"demo"}
    assert world.states()["curate"] == ("Starting", 1)
    assert world.api.list_objects("jobs")[0]["metadata"]["ownerReferences"][0]["uid"] == world.run["metadata"]["uid"]
    await world.until(lambda: world.api.list_objects("events"))
    assert {e["reason"] for e in world.api.list_objects("events")} == {"StageStarted"}


async def test_nothing_is_created_for_a_run_outside_of_an_allow_list():
    settings = replace(SETTINGS, allowed=AllowLists(images=("ghcr.io/team",)))
    async with running(settings) as world:
        await world.apply(spread())
        await world.until(lambda: world.run.get("status"))
        await world.until_idle()
        failed = decode_status(world.run["status"]).condition(ConditionType.FAILED)
        assert (failed.status, failed.reason) == ("True", "InvalidSpec")
        assert failed.message.startswith("spec.image: registry.example.com/sailvl-trainer:0.1.0 is not allowed")
        assert (world.api.list_names("jobs"), world.api.list_names("services")) == (set(), set())


async def test_single_worker_needs_no_service(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    assert world.api.list_names("services") == set()


def find_rendezvous_secrets(world: ControllerWorld) -> list[str]:
    """Return the secrets in the environments of all Jobs."""
    containers = [job["spec"]["template"]["spec"]["containers"][0] for job in world.api.list_objects("jobs")]
    return [e["value"] for c in containers for e in c["env"] if e["name"] == Env.RENDEZVOUS_SECRET]


async def test_each_job_has_a_random_rendezvous_secret_of_its_own(world):
    for name in ("demo", "other"):
        document = spread()
        document["metadata"]["name"] = name
        world.send_event(world.api.put("sailvlruns", document), "ADDED")
    await world.until(lambda: len(world.api.list_names("jobs")) == 2)
    secrets = set(find_rendezvous_secrets(world))
    assert len(secrets) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", secret) for secret in secrets)


async def test_job_of_a_single_worker_needs_no_secret(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    assert find_rendezvous_secrets(world) == []


async def test_deleted_service_is_created_again(world):
    await world.apply(spread())
    await world.until(lambda: world.api.list_names("services"))
    world.api.remove_named("services", "demo")
    await world.until(lambda: world.api.list_names("services"))


async def test_status_names_a_later_attempt_before_its_job_exists(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"] == ("Running", 1))
    del world.api.requests[:]
    await world.end_pod("curate", 1, 0, 1)
    await world.until(lambda: "demo-curate-2" in world.api.list_names("jobs"))
    writes = [path.rsplit("/", 2)[-1] for _, path in world.api.list_writes()]
    assert writes.index("status") < writes.index("jobs")


async def test_next_attempt_starts_before_the_dead_one_is_deleted(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"] == ("Running", 1))
    del world.api.requests[:]
    await world.end_pod("curate", 1, 0, 75)  # preempted: restarted without a backoff
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    writes = [(method, path.rsplit("/", 2)[-1]) for method, path in world.api.list_writes()]
    assert writes.index(("POST", "jobs")) < writes.index(("DELETE", "pods")) < writes.index(("DELETE", "demo-curate-1"))


async def test_jobs_of_new_runs_are_created_before_statuses_are_written(world):
    """All Jobs of ten runs that are created at once precede any status."""
    for number in range(10):
        document = build_document()
        document["metadata"]["name"] = f"run-{number}"
        world.send_event(world.api.put("sailvlruns", document), "ADDED")
    await world.until(lambda: len(world.api.list_names("jobs")) == 10)
    await world.until_idle()
    writes = [path.rsplit("/", 2)[-1] for method, path in world.api.list_writes() if "events" not in path]
    last_job = max(i for i, what in enumerate(writes) if what == "jobs")
    assert writes[: last_job + 1].count("status") <= 2, "but for those that two workers were at already"
    assert writes.count("status") == 10


async def test_deferred_writes_do_not_delay_a_restart(world):
    """If a worker fails under backpressure, its cause is decided in time and the next attempt starts."""
    await world.apply(build_document(stages=build_document()["spec"]["stages"][2:3]))
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("knowledge", nodes=2)
    await world.until(lambda: world.states()["knowledge"] == ("Running", 1))
    world.has_backpressure = True
    await world.end_pod("knowledge", 1, 0, 76)
    await world.until(lambda: "demo-knowledge-2" in world.api.list_names("jobs"))


async def test_end_of_a_stage_is_not_deferred(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    world.has_backpressure = True
    await world.add_pods("curate")
    await world.end_pod("curate", 1, 0, 0, result=build_result("curate"))
    await world.until(lambda: "demo-alignment-1" in world.api.list_names("jobs"))


async def test_unchanged_status_is_not_written(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"][0] == "Running")
    await world.until_idle()
    before = len(world.api.list_writes())
    for _ in range(3):
        world.queue.add(KEY)
        await world.until_idle()
    assert world.api.list_writes()[before:] == []


async def test_run_succeeds_after_all_stages(world):
    await world.apply(build_document())
    for stage, nodes in (("curate", 1), ("alignment", 2), ("knowledge", 2), ("evaluate", 1)):
        await world.until(lambda stage=stage: f"demo-{stage}-1" in world.api.list_names("jobs"))
        await world.add_pods(stage, nodes=nodes)
        await world.until(lambda stage=stage: world.states()[stage][0] == "Running")
        for index in range(nodes):
            await world.end_pod(stage, 1, index, 0, result=build_result(stage))
        await world.until(lambda stage=stage: world.states()[stage][0] == "Succeeded")
    await world.until_idle()
    assert world.status.is_true("Succeeded")
    assert len(world.api.list_names("jobs")) == 4


async def test_lost_pod_starts_the_next_attempt_and_deletes_the_failed_one(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"][0] == "Running")
    world.api.remove_named("pods", "demo-curate-1-0-x")
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    await world.until_idle()
    assert world.states()["curate"] == ("Restarting", 2)
    assert world.status.stages[0].last_failure.cause == "Infra"
    assert world.owned_objects.pods.get(KEY) == [], "the evidence of a closed attempt is discarded"


async def test_final_failure_ends_the_run_and_deletes_its_pods(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("curate")
    await world.end_pod("curate", 1, 0, 64, message="unknown preset", rank=0)
    await world.until(lambda: world.status.is_true("Failed"))
    await world.until(lambda: not world.api.list_names("jobs") and not world.api.list_names("pods"))
    assert "unknown preset" in world.status.condition("Failed").message


async def test_run_is_suspended_and_resumed(world):
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs"))
    await world.add_pods("curate")
    await world.until(lambda: world.states()["curate"][0] == "Running")
    await world.apply(build_document(suspend=True))
    await world.until(lambda: world.api.list_objects("jobs")[0]["spec"]["suspend"])
    world.api.remove_named("pods", "demo-curate-1-0-x")
    await world.until(lambda: world.status.is_true("Suspended"))
    await world.apply(build_document())
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    assert not world.status.is_true("Suspended")


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
    await world.apply(spread())
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-1"})
    await world.until(lambda: world.api.list_names("services") == {"demo"})
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.until_idle()
    assert world.states()["curate"] == ("Starting", 1)


@pytest.mark.parametrize("resource", ["jobs", "services", "persistentvolumeclaims"])
@pytest.mark.parametrize("status", [400, 413])
async def test_refusal_of_any_object_makes_the_run_stuck_with_the_message(world, resource, status):
    world.api.injected_errors = [InjectedError(method="POST", path_end=f"/{resource}", status=status, times=1000)]
    document = spread()
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


async def test_restart_request_is_applied_once_and_its_annotation_removed(world):
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    annotated = copy.deepcopy(world.run)
    annotated["metadata"]["annotations"] = {names.ANNOTATION_RESTART: "curate"}
    world.send_event(world.api.put("sailvlruns", annotated))
    await world.until(lambda: world.api.list_names("jobs") == {"demo-curate-2"})
    await world.until(lambda: not world.run["metadata"].get("annotations"))
    world.send_event(world.run)
    await world.until(lambda: not world.status.observed_restart_request)
    assert world.states()["curate"] == ("Starting", 2) or world.states()["curate"] == ("Restarting", 2)


async def test_run_is_deleted_after_its_ttl(world):
    await world.apply(build_document(ttlSecondsAfterFinished=0, stages=build_document()["spec"]["stages"][:1]))
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    await world.add_pods("curate")
    await world.end_pod("curate", 1, 0, 0, result=build_result("curate"))
    await world.until(lambda: not world.api.list_objects("sailvlruns"))


async def test_invalid_spec_fails_the_run_until_it_is_fixed(world):
    await world.apply(build_document(model={"preset": "huge"}))
    await world.until(lambda: world.status.is_true("Failed"))
    assert world.status.condition("Failed").reason == "InvalidSpec"
    assert "preset" in world.status.condition("Failed").message
    await world.until_idle()
    assert world.api.list_names("jobs") == set()
    await world.apply(build_document())
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
    assert not world.status.is_true("Failed")


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


async def test_edits_beyond_the_limit_of_a_namespace_are_reconciled_together(monkeypatch):
    monkeypatch.setattr("sailvl_operator.cluster.edit_limit._BURST_SECONDS", 0.0)
    monkeypatch.setattr("sailvl_operator.cluster.edit_limit.BYTES_PER_SECOND", 40_000)
    parsed = []

    def count(raw: Any) -> Run:
        parsed.append(raw)
        return parse_run(raw)

    monkeypatch.setattr("sailvl_operator.cluster.runs.parse_run", count)
    async with running() as world:
        await world.apply(build_document())
        await world.until(lambda: world.api.list_names("jobs"))
        for seed in range(30):
            await world.apply(build_document(seed=seed))
            await asyncio.sleep(0.01)
        generation = world.run["metadata"]["generation"]
        await world.until(lambda: world.status.observed_generation == generation)
        assert world.runs.get(KEY).run.spec.seed == 29
    assert len(parsed) < 10
