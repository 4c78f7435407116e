"""User actions on a real cluster: suspend, deadlines, TTL, edits, appended stages, restarts, gates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from sailvl_operator.cluster.resources import EVENTS, PODS
from sailvl_operator.core.units import parse_time
from tests.support.live.api import CLAIMS, ApiStatusError, ClusterApi, Object, wait_until
from tests.support.live.replicas import OperatorReplica
from tests.support.live.stub_runs import (
    StubRun,
    Workspace,
    build_stage,
    build_stub_image,
    open_operator,
    open_workspace,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def workspace(cluster: Any, kubeconfig: str, resource: None) -> Iterator[Workspace]:
    if not cluster.is_ours:
        pytest.skip("the test reads the workers' storage: it needs the cluster of `make cluster`")
    image = build_stub_image(cluster.registry)
    with ClusterApi(kubeconfig) as api, open_workspace(api, image, prefix="actions") as workspace:
        yield workspace


@pytest.fixture(scope="module", autouse=True)
def operator(
    workspace: Workspace, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorReplica]:
    with open_operator(kubeconfig, [workspace], tmp_path_factory.mktemp("operator")) as operator:
        yield operator


def build_journal(*entries: str, attempt: int = 1, nodes: int = 2) -> list[str]:
    """Return the sorted journal of an attempt whose workers all log the same entries."""
    return sorted(f"draw-a {attempt} {index} {entry}" for entry in entries for index in range(nodes))


def count_restarts(run: StubRun) -> tuple[Object, Object]:
    """Return all restarts and the counted restarts, by cause."""
    return run.stage().get("restarts", {}), run.stage().get("countedRestarts", {})


def test_suspended_workers_save_and_next_attempt_resumes(workspace):
    run = StubRun(workspace, "paused", "slow", nodes=2)
    run.wait_for_stage("Running")
    run.edit(suspend=True)
    wait_until(lambda: run.condition("Running") == ("False", "Suspended", "the workers save a checkpoint"))
    run.wait_for_condition("Suspended")
    assert sorted(run.journal) == build_journal("started", "sigterm", "saved")
    assert run.stage_state() == ("Suspended", 1)
    wait_until(lambda: run.list_owned(PODS) == [])
    run.edit(suspend=False)
    run.wait_for_stage("Running", 2)
    assert not run.is_true("Suspended")
    assert run.jobs == ["paused-draw-a-2"]
    assert count_restarts(run) == ({}, {})
    assert "lost" not in run.status["goodput"]["seconds"]
    run.delete()


def test_run_created_suspended_starts_when_resumed(workspace):
    run = StubRun(workspace, "asleep", "succeed", suspend=True)
    run.wait_for_condition("Suspended")
    assert (run.count_owned(), run.stage_state()) == (0, ("Pending", 0))
    run.edit(suspend=False)
    run.wait_for_condition("Succeeded")
    assert run.stage_state() == ("Succeeded", 1)


def test_deadline_fails_run_and_later_deadline_resumes_it(workspace):
    run = StubRun(workspace, "bounded", "slow", nodes=2)
    run.wait_for_stage("Running")
    limit = int(time.time() - parse_time(run.status["startTime"])) + 4
    run.edit(activeDeadlineSeconds=limit)
    assert run.wait_for_condition("Failed") == "DeadlineExceeded"
    assert run.condition("Failed")[2] == "the run was active for activeDeadlineSeconds; raise it to resume the run"
    ledger = run.status["goodput"]["seconds"]
    assert limit <= sum(ledger.values()) - ledger.get("queued", 0) <= limit + 2
    wait_until(lambda: run.jobs == [] and run.list_owned(PODS) == [], describe=run.describe)
    assert sorted(run.journal) == build_journal("started", "sigterm", "saved")
    run.edit(activeDeadlineSeconds=600)
    run.wait_for_stage("Running", 2)
    assert not run.is_true("Failed")
    assert count_restarts(run) == ({}, {})
    run.delete()


def test_parallel_stage_saves_when_gate_fails_run(workspace):
    gate = {"metric": "score", "atLeast": "0.9"}
    parallel = build_stage("draw-b", dependsOn=[], workers=StubRun.build_env("slow"))
    run = StubRun(workspace, "parallels", "until", stages=[DRAW_A | {"gate": gate}, parallel])
    for index in (0, 1):
        run.wait_for_stage("Running", index=index)
    run.release("draw-a")
    assert run.wait_for_condition("Failed") == "GateFailed"
    wait_until(lambda: run.journal[-2:] == ["draw-b 1 0 sigterm", "draw-b 1 0 saved"], describe=run.describe)
    wait_until(lambda: run.jobs == ["parallels-draw-a-1"])
    run.edit(stages=[DRAW_A | {"gate": gate | {"atLeast": "0"}}, parallel | {"workers": StubRun.build_env("until")}])
    run.release("draw-b")
    run.wait_for_condition("Succeeded")
    assert (run.stage_state(0), run.stage_state(1)) == (("Succeeded", 1), ("Succeeded", 2))


def create_with_claim(workspace: Workspace, name: str, when_deleted: str) -> StubRun:
    template = {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
    storage = {"volumeClaimTemplate": template, "whenDeleted": when_deleted}
    return StubRun(workspace, name, "succeed", storage=storage, ttlSecondsAfterFinished=3)


def test_finished_run_is_deleted_after_ttl_and_claim_by_policy(workspace):
    names = {"retained": "Retain", "deleted-claim": "Delete"}
    for name in names:
        workspace.add_volume(f"{workspace.namespace}-{name}", f"{name}-storage")
    runs = {name: create_with_claim(workspace, name, when_deleted) for name, when_deleted in names.items()}
    finished: dict[str, str] = {}

    def all_finished() -> bool:
        finished.update({n: run.status["completionTime"] for n, run in runs.items() if run.is_true("Succeeded")})
        return len(finished) == len(runs)

    wait_until(all_finished)
    for name, run in runs.items():
        wait_until(lambda run=run: not run.raw)
        assert time.time() - parse_time(finished[name]) >= 3
        wait_until(lambda run=run: run.count_owned() == 0)

    def find_claim(name: str) -> str:
        found = workspace.api.get(CLAIMS, f"{name}-storage", workspace.namespace)
        return "" if found is None else found["metadata"]["uid"]

    wait_until(lambda: not find_claim("deleted-claim"))
    retained = find_claim("retained")
    assert retained
    successor = create_with_claim(workspace, "retained", "Retain")
    successor.wait_for_condition("Succeeded")
    assert find_claim("retained") == retained
    assert successor.uid != runs["retained"].uid
    journal = (workspace.storage / "retained-storage" / "retained.journal").read_text().splitlines()
    assert journal == ["draw-a 1 0 started", "draw-a 1 0 finished"] * 2


def test_deleted_run_saves_and_removes_all_objects(workspace, operator):
    run = StubRun(workspace, "deleted", "slow", nodes=2)
    run.wait_for_stage("Running")
    run.delete()
    wait_until(lambda: run.count_owned() == 0)
    assert sorted(run.journal) == build_journal("started", "sigterm", "saved")
    assert run.raw == {}
    series = f'sailvl_run_stage_attempt{{namespace="{workspace.namespace}",run="deleted"'
    wait_until(lambda: operator.read_metric(series) == 0)


@pytest.fixture(scope="module")
def edited(workspace: Workspace, operator: OperatorReplica) -> Iterator[tuple[StubRun, list[str]]]:
    """Create a run whose first stage runs and whose second has not started; yield it with the uids of its pods."""
    run = StubRun(workspace, "edited", "hold", stages=2)
    run.wait_for_stage("Running")
    yield run, [pod["metadata"]["uid"] for pod in run.list_owned(PODS)]
    run.delete()


OTHER = {"curate": {"sources": [{"format": "procedural", "samples": 9}]}}
DRAW_A, DRAW_B = build_stage("draw-a"), build_stage("draw-b")
IMMUTABLE = "stage draw-a: stages are immutable once started; append a new stage"
EDITS = [
    pytest.param({"stages": [DRAW_A | OTHER, DRAW_B]}, IMMUTABLE, id="started stage"),
    pytest.param(
        {"stages": [DRAW_A | {"name": "other"}, DRAW_B]},
        "stages can't be removed, renamed or reordered",
        id="name of a started stage",
    ),
    pytest.param({"stages": [DRAW_B, DRAW_A]}, "stages can't be removed, renamed or reordered", id="order of stages"),
    pytest.param(
        {"stages": [DRAW_A]},
        "stages can't be removed, renamed or reordered; append new stages at the end",
        id="removed stage",
    ),
    pytest.param({"model": {"preset": "sail-vl-2b"}}, "model is immutable once a stage has started", id="model"),
    pytest.param({"storage": {"volumeClaim": "x"}}, "storage is immutable once a stage has started", id="storage"),
    pytest.param({"seed": 1}, "seed is immutable once a stage has started; create a new run", id="seed"),
    pytest.param({"stages": [DRAW_A, DRAW_B | OTHER]}, "", id="stage that has not started"),
    pytest.param({"stages": [DRAW_A, DRAW_B | OTHER, build_stage("draw-c")]}, "", id="appended stage"),
    pytest.param(
        {"stages": [DRAW_A | {"gate": {"metric": "score", "atLeast": "0"}}, DRAW_B | OTHER, build_stage("draw-c")]},
        "",
        id="gate of a started stage",
    ),
    pytest.param({"workers": {"nodes": 2}}, "", id="workers"),
    pytest.param({"image": "localhost:5000/other:1"}, "", id="image"),
    pytest.param({"restartPolicy": {"maxRestarts": 3}}, "", id="restart budget"),
    pytest.param({"activeDeadlineSeconds": 3600}, "", id="deadline"),
]


@pytest.mark.parametrize(("spec", "message"), EDITS)
def test_edit_of_running_run(spec: Object, message: str, edited: tuple[StubRun, list[str]]) -> None:
    run, pods = edited
    if message:
        with pytest.raises(ApiStatusError) as error:
            run.edit(**spec)
        assert message in str(error.value)
        return
    run.edit(**spec)
    generation = run.raw["metadata"]["generation"]
    wait_until(lambda: run.status.get("observedGeneration") == generation)
    assert run.stage_state() == ("Running", 1)
    assert [pod["metadata"]["uid"] for pod in run.list_owned(PODS)] == pods


def test_edited_workers_apply_to_next_attempt(workspace):
    run = StubRun(workspace, "moved", "hold")
    run.wait_for_stage("Running")
    run.edit(workers={"nodes": 2} | StubRun.build_env("succeed"))
    run.api.delete(PODS, run.list_owned(PODS)[0]["metadata"]["name"], workspace.namespace)
    run.wait_for_condition("Succeeded")
    assert sorted(run.journal[-4:]) == build_journal("started", "finished", attempt=2)


def test_appended_stage_resumes_finished_run(workspace):
    run = StubRun(workspace, "longer", "succeed")
    run.wait_for_condition("Succeeded")
    before = run.stage()
    run.edit(stages=[DRAW_A, DRAW_B])
    wait_until(lambda: not run.is_true("Succeeded"))
    run.wait_for_condition("Succeeded")
    assert (run.stage(), run.stage_state(1)) == (before, ("Succeeded", 1))
    assert run.journal == [
        f"{stage} 1 0 {event}" for stage in ("draw-a", "draw-b") for event in ("started", "finished")
    ]


def test_restart_request_starts_new_attempt_unless_stage_succeeded(workspace):
    hung, failed, finished = (StubRun(workspace, f"restart-{stub}", stub) for stub in ("hold", "config", "succeed"))
    hung.wait_for_stage("Running")
    hung.request_restart("draw-a")
    failed.wait_for_condition("Failed")
    failed.edit(workers=StubRun.build_env("succeed"))
    failed.request_restart("draw-a")
    finished.wait_for_condition("Succeeded")
    finished.request_restart("draw-a")
    hung.wait_for_stage("Running", 2)
    failed.wait_for_condition("Succeeded")
    assert (hung.jobs, failed.stage_state(), finished.stage_state()) == (
        ["restart-hold-draw-a-2"],
        ("Succeeded", 2),
        ("Succeeded", 1),
    )
    assert [count_restarts(run) for run in (hung, failed, finished)] == [({}, {})] * 3
    assert not failed.is_true("Failed")
    hung.request_restart("nonsense")
    wait_until(lambda: has_event(hung, "RestartRequested", "there is no stage 'nonsense'; stages are draw-a"))
    wait_until(lambda: has_event(finished, "RestartRequested", "stage draw-a has its result"))
    assert finished.journal == ["draw-a 1 0 started", "draw-a 1 0 finished"]
    hung.edit(suspend=True)
    hung.wait_for_condition("Suspended")
    hung.request_restart("draw-a")
    wait_until(lambda: has_event(hung, "RestartRequested", "set spec.suspend to false to resume it"))
    assert hung.stage_state() == ("Suspended", 2)
    hung.delete()


def has_event(run: StubRun, reason: str, message: str) -> bool:
    events = run.api.list(EVENTS, run.workspace.namespace, fields=f"involvedObject.uid={run.uid},reason={reason}")
    return any(message in event["message"] for event in events)


def build_gated_stages(at_least: str, on_fail: str) -> list[Object]:
    return [DRAW_A | {"gate": {"metric": "score", "atLeast": at_least, "onFail": on_fail}}, DRAW_B]


def test_gate_fails_pauses_or_warns_and_passes_when_relaxed(workspace):
    stopped, paused, warned = (
        StubRun(workspace, f"gate-{on_fail.lower()}", "succeed", stages=build_gated_stages("0.9", on_fail))
        for on_fail in ("Stop", "Pause", "Continue")
    )
    wanted = "stage draw-a: gate failed: score is 0.5, but must be at least 0.9"
    assert stopped.wait_for_condition("Failed") == "GateFailed"
    assert stopped.condition("Failed")[2] == wanted
    assert paused.wait_for_condition("Stuck") == "GateNotPassed"
    assert warned.wait_for_condition("Succeeded") == "Completed"
    assert warned.condition("GatesPassed") == ("False", "GateFailed", wanted)
    for run, on_fail in ((stopped, "Stop"), (paused, "Pause")):
        assert (run.stage_state(0), run.stage_state(1)) == (("Succeeded", 1), ("Pending", 0))
        run.edit(stages=build_gated_stages("0.4", on_fail))
    for run in (stopped, paused):
        run.wait_for_condition("Succeeded")
        assert run.condition("GatesPassed")[:2] == ("True", "GatePassed")
        assert (run.is_true("Failed"), run.is_true("Stuck")) == (False, False)
        assert run.journal == warned.journal
