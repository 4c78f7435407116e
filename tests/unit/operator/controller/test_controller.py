"""The controller against an API server: whole runs, and the order of writes."""

from __future__ import annotations

import asyncio
import copy
import re
from dataclasses import replace
from typing import Any

import pytest

from sailvl_operator.api import names
from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.status import ConditionType, decode_status
from sailvl_operator.api.types import Run
from sailvl_trainer.contract import Env
from tests.support.builders.operator import build_document, build_result
from tests.support.controller_world import KEY, SETTINGS, ControllerWorld, build_two_worker_document, running


@pytest.fixture
async def world():
    async with running() as world:
        yield world


async def test_first_job_and_service_are_created(world):
    await world.apply(build_two_worker_document())
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
        await world.apply(build_two_worker_document())
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
        document = build_two_worker_document()
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
    await world.apply(build_two_worker_document())
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
    await world.until(lambda: world.states()["curate"] == ("Starting", 1))
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
