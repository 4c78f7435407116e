"""Runs in Kueue's queues on a real cluster: they wait for admission, are preempted and admitted again, and never change
`suspend` of a queued Job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from sailvl_operator.cluster.resources import JOBS, PODS
from sailvl_operator.core.units import parse_time
from tests.support.live.api import PRIORITIES, ClusterApi, build_object, wait_until
from tests.support.live.kueue import FLAVOR, FakeKueue, get_workload_resource, install_workloads, serve_workloads
from tests.support.live.replicas import OperatorReplica
from tests.support.live.stub_runs import StubRun, Workspace, build_stub_image, open_operator, open_workspace

pytestmark = pytest.mark.cluster

QUOTAS = {"turns": 1, "preempted": 1, "evicted": 2, "paused": 1, "full": 0, "deleted-job": 0}
"""Maximum number of pods by queue; each test has its own queue."""
TIMEOUT = 15
FULL = "couldn't assign flavors to pod set main: insufficient unused quota for pods in flavor default, 1 more needed"


@pytest.fixture(scope="module")
def workspace(cluster: Any, kubeconfig: str, resource: None) -> Iterator[Workspace]:
    if not cluster.is_ours:
        pytest.skip("the test reads the workers' storage: it needs the cluster of `make cluster`")
    image = build_stub_image(cluster.registry)
    with (
        ClusterApi(kubeconfig) as api,
        open_workspace(api, image, prefix="kueue") as workspace,
        install_workloads(api) as is_ours,
    ):
        if not is_ours:
            pytest.skip("the cluster has a Kueue of its own")
        yield workspace


@pytest.fixture(scope="module")
def kueue(workspace: Workspace, kubeconfig: str) -> Iterator[FakeKueue]:
    with (
        ClusterApi(kubeconfig, "kueue") as api,
        FakeKueue(api=api, namespace=workspace.namespace, quotas=dict(QUOTAS)) as kueue,
    ):
        yield kueue
    assert kueue.resumed
    assert kueue.violations == [], "only Kueue may change suspend of a queued Job"


@pytest.fixture(scope="module", autouse=True)
def operator(
    workspace: Workspace, kueue: FakeKueue, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorReplica]:
    with open_operator(kubeconfig, [workspace], tmp_path_factory.mktemp("operator")) as operator:
        yield operator


@pytest.fixture(scope="module", autouse=True)
def run_without_queue(operator: OperatorReplica, workspace: Workspace) -> StubRun:
    """Create a run whose queue does not exist yet; it waits while the other tests run."""
    limits = {"restartPolicy": {"startTimeoutSeconds": TIMEOUT}, "activeDeadlineSeconds": TIMEOUT}
    return enqueue(workspace, "without-queue", "until", "nowhere", **limits)


@pytest.fixture(scope="module")
def important(workspace: Workspace) -> Iterator[str]:
    """Create a PriorityClass above that of the other pods."""
    name = f"{workspace.namespace}-important"
    body = build_object("PriorityClass", name, "scheduling.k8s.io/v1", value=1000, preemptionPolicy="Never")
    workspace.api.create(PRIORITIES, body)
    yield name
    workspace.api.delete(PRIORITIES, name)


def enqueue(workspace: Workspace, name: str, stub: str, queue: str, *, workers: Any = None, **spec: Any) -> StubRun:
    return StubRun(workspace, name, stub, workers={"queueName": queue} | (workers or {}), **spec)


def find_workloads(run: StubRun) -> list[str]:
    """Return the names of a run's Jobs that have Workloads."""
    workloads = run.api.list(get_workload_resource("v1beta2"), run.workspace.namespace)
    owners = (workload["metadata"]["ownerReferences"][0]["name"] for workload in workloads)
    return sorted(name for name in owners if name.startswith(f"{run.name}-draw"))


def measure_queued_seconds(run: StubRun) -> float:
    """Return the time from the run's start until its newest worker was scheduled."""
    conditions = run.list_owned(PODS)[-1]["status"]["conditions"]
    placed = next(c["lastTransitionTime"] for c in conditions if c["type"] == "PodScheduled")
    return parse_time(placed) - parse_time(run.status["startTime"])


def measure_active_seconds(run: StubRun) -> float:
    """Return the time from the run's start to its end."""
    return parse_time(run.status["completionTime"]) - parse_time(run.status["startTime"])


def wait_for_queued(run: StubRun, message: str, attempt: int = 1, *, index: int = 0) -> None:
    """Wait until the Stuck condition shows Kueue's message."""
    wait_until(lambda: run.condition("Stuck") == ("True", "Queued", message), describe=run.describe)
    state = "Starting" if attempt == 1 else "Restarting"
    assert run.stage_state(index) == (state, attempt)
    assert run.status["summary"]["reason"] == "Queued"


def test_runs_alternate_stage_by_stage(workspace, kueue):
    first = enqueue(workspace, "first", "until", "turns", stages=2)
    first.wait_for_stage("Running")
    second = enqueue(workspace, "second", "until", "turns")
    wait_for_queued(second, f"Kueue's queue turns: {FULL}")
    assert second.list_owned(PODS) == []
    assert find_workloads(first) == ["first-draw-a-1"], "only a stage that can start has a Workload"
    [pod] = first.list_owned(PODS)
    assert pod["spec"]["nodeSelector"] == FLAVOR["nodeSelector"]
    assert FLAVOR["tolerations"][0] in pod["spec"]["tolerations"]

    first.release("draw-a")
    second.wait_for_stage("Running")
    assert not second.is_true("Stuck")
    wait_until(lambda: first.condition("Stuck")[1] == "Queued")
    assert (first.stage_state(0), first.stage_state(1)) == (("Succeeded", 1), ("Starting", 1))

    second.release()
    second.wait_for_condition("Succeeded")
    first.wait_for_stage("Running", index=1)
    first.release("draw-b")
    first.wait_for_condition("Succeeded")
    order = [name for name in kueue.resumed if name in first.jobs + second.jobs]
    assert order == ["first-draw-a-1", "second-draw-a-1", "first-draw-b-1"]
    assert second.journal == ["draw-a 1 0 started", "draw-a 1 0 finished"]
    ledger = second.status["goodput"]["seconds"]
    assert abs(ledger["queued"] - measure_queued_seconds(second)) <= 2
    assert abs(sum(ledger.values()) - measure_active_seconds(second)) <= 1


def test_preempted_run_saves_and_resumes_after_readmission(workspace, kueue, important):
    lower = enqueue(workspace, "lower", "slow", "preempted")
    lower.wait_for_stage("Running")
    higher = enqueue(workspace, "higher", "until", "preempted", workers={"priorityClassName": important})
    higher.wait_for_stage("Running")
    lower.wait_for_stage("Restarting", 2)
    stage = lower.stage()
    assert (stage["lastFailure"]["cause"], stage["lastFailure"]["exitCode"]) == ("Preempted", 75)
    assert stage["restarts"] == {"Preempted": 1}
    assert lower.journal == ["draw-a 1 0 started", "draw-a 1 0 sigterm", "draw-a 1 0 saved"]
    wait_until(lambda: lower.jobs == ["lower-draw-a-2"] and lower.condition("Stuck")[1] == "Queued")
    higher.release()
    higher.wait_for_condition("Succeeded")
    lower.wait_for_stage("Running", 2)
    wait_until(lambda: lower.journal[3:] == ["draw-a 2 0 started"])
    assert "lost" not in lower.status["goodput"]["seconds"]
    assert lower.status["goodput"].get("lostSteps", 0) == 0
    lower.delete()


def test_run_evicted_and_readmitted_at_once_resumes(workspace, kueue):
    run = enqueue(workspace, "evicted", "slow", "evicted", nodes=2)
    run.wait_for_stage("Running")
    kueue.to_evict.add("evicted-draw-a-1")
    run.wait_for_stage("Running", 2)
    assert run.stage()["restarts"] == {"Preempted": 1}
    wait_until(lambda: run.jobs == ["evicted-draw-a-2"] and len(run.list_owned(PODS)) == 2, describe=run.describe)
    first_attempt = [f"draw-a 1 {index} {event}" for event in ("started", "sigterm", "saved") for index in (0, 1)]
    second_attempt = ["draw-a 2 0 started", "draw-a 2 1 started"]
    wait_until(lambda: sorted(run.journal) == sorted(first_attempt + second_attempt), describe=run.describe)
    run.delete()


def test_suspended_run_frees_quota_and_queues_again(workspace, kueue):
    run, other = (enqueue(workspace, name, "slow", "paused") for name in ("paused", "waiting"))
    run.wait_for_stage("Running")
    other.edit(suspend=True)  # while the Job is suspended in the queue
    other.wait_for_condition("Suspended")
    wait_until(lambda: find_workloads(other) == [])
    assert other.journal == []

    run.edit(suspend=True)  # while the Job is running
    run.wait_for_condition("Suspended")
    assert run.journal == ["draw-a 1 0 started", "draw-a 1 0 sigterm", "draw-a 1 0 saved"]
    assert (run.jobs, find_workloads(run)) == ([], [])
    other.edit(suspend=False)
    other.wait_for_stage("Running", 2)
    run.edit(suspend=False)
    wait_until(lambda: run.jobs == ["paused-draw-a-2"] and run.condition("Stuck")[1] == "Queued")
    other.delete()
    run.wait_for_stage("Running", 2)
    run.delete()


def test_queued_run_is_deleted_with_its_workload(workspace, kueue):
    run = enqueue(workspace, "deleted", "hold", "full")
    wait_until(lambda: find_workloads(run) == ["deleted-draw-a-1"])
    run.delete()
    wait_until(lambda: run.count_owned() == 0 and find_workloads(run) == [])


def test_deleted_job_of_queued_run_is_created_again(workspace, kueue):
    run = enqueue(workspace, "removed", "hold", "deleted-job")
    wait_until(lambda: run.condition("Stuck")[1] == "Queued")
    [job] = run.list_owned(JOBS)
    run.api.delete(JOBS, job["metadata"]["name"], workspace.namespace)
    wait_until(lambda: [j["metadata"]["uid"] for j in run.list_owned(JOBS)] not in ([], [job["metadata"]["uid"]]))
    run.delete()


def test_timeouts_do_not_count_while_queued(workspace, kueue, run_without_queue):
    wait_for_queued(run_without_queue, "Kueue's queue nowhere: LocalQueue nowhere doesn't exist")
    end = parse_time(run_without_queue.status["startTime"]) + TIMEOUT + 2
    wait_until(lambda: time.time() > end)
    assert run_without_queue.stage_state() == ("Starting", 1)
    assert run_without_queue.jobs == ["without-queue-draw-a-1"]
    run_without_queue.edit(
        restartPolicy={"startTimeoutSeconds": 600}, activeDeadlineSeconds=600
    )  # only later changes count

    serve_workloads(workspace.api, "v1beta1")  # the behaviour of older Kueue versions
    kueue.workloads, kueue.quotas["nowhere"] = get_workload_resource("v1beta1"), 0
    wait_for_queued(run_without_queue, f"Kueue's queue nowhere: {FULL}")
    kueue.quotas["nowhere"] = 1
    run_without_queue.wait_for_stage("Running")
    assert not run_without_queue.is_true("Stuck")
    run_without_queue.delete()
