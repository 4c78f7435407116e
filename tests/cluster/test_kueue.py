"""Runs in Kueue's queues, on a real cluster: they wait for their turn, lose it and get it again, and touch nothing of
Kueue's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from sailvl_operator.cluster.resources import JOBS, PODS
from sailvl_operator.core.units import parse_time
from tests.support.live.api import PRIORITIES, Api, build_object, until
from tests.support.live.kueue import FLAVOR, Kueue, at_version, install_workloads, serve_workloads
from tests.support.live.replicas import Replica
from tests.support.live.stub_runs import Place, Run, build_image, open_operator, open_place

pytestmark = pytest.mark.cluster

QUOTAS = {"turns": 1, "taken": 1, "returned": 2, "paused": 1, "full": 0, "gone": 0}
"""Pods by queue; each test has its own."""
TIMEOUT = 15
FULL = "couldn't assign flavors to pod set main: insufficient unused quota for pods in flavor default, 1 more needed"


@pytest.fixture(scope="module")
def place(cluster: Any, kubeconfig: str, resource: None) -> Iterator[Place]:
    if not cluster.is_ours:
        pytest.skip("the test reads the workers' storage: it needs the cluster of `make cluster`")
    image = build_image(cluster.registry)
    with Api(kubeconfig) as api, open_place(api, image, prefix="kueue") as place, install_workloads(api) as is_ours:
        if not is_ours:
            pytest.skip("the cluster has a Kueue of its own")
        yield place


@pytest.fixture(scope="module")
def kueue(place: Place, kubeconfig: str) -> Iterator[Kueue]:
    with Api(kubeconfig, "kueue") as api, Kueue(api=api, namespace=place.namespace, quotas=dict(QUOTAS)) as kueue:
        yield kueue
    assert kueue.let_go
    assert kueue.trespasses == [], "the suspend of a queued Job is Kueue's alone"


@pytest.fixture(scope="module", autouse=True)
def operator(
    place: Place, kueue: Kueue, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replica]:
    with open_operator(kubeconfig, [place], tmp_path_factory.mktemp("operator")) as operator:
        yield operator


@pytest.fixture(scope="module", autouse=True)
def homeless(operator: Replica, place: Place) -> Run:
    """A run whose queue doesn't exist yet; it waits while the other tests run."""
    limits = {"restartPolicy": {"startTimeoutSeconds": TIMEOUT}, "activeDeadlineSeconds": TIMEOUT}
    return enqueue(place, "homeless", "until", "nowhere", **limits)


@pytest.fixture(scope="module")
def important(place: Place) -> Iterator[str]:
    """A priority above that of the other pods."""
    name = f"{place.namespace}-important"
    body = build_object("PriorityClass", name, "scheduling.k8s.io/v1", value=1000, preemptionPolicy="Never")
    place.api.create(PRIORITIES, body)
    yield name
    place.api.delete(PRIORITIES, name)


def enqueue(place: Place, name: str, stub: str, queue: str, *, workers: Any = None, **spec: Any) -> Run:
    return Run(place, name, stub, workers={"queueName": queue} | (workers or {}), **spec)


def find_workloads(run: Run) -> list[str]:
    """Names of the Jobs that Kueue has Workloads of."""
    workloads = run.api.list(at_version("v1beta2"), run.place.namespace)
    owners = (workload["metadata"]["ownerReferences"][0]["name"] for workload in workloads)
    return sorted(name for name in owners if name.startswith(f"{run.name}-draw"))


def count_waited(run: Run) -> float:
    """Seconds from the run's start until its newest worker was given to a node."""
    conditions = run.children(PODS)[-1]["status"]["conditions"]
    placed = next(c["lastTransitionTime"] for c in conditions if c["type"] == "PodScheduled")
    return parse_time(placed) - parse_time(run.status["startTime"])


def count_active(run: Run) -> float:
    """Seconds from the run's start to its end."""
    return parse_time(run.status["completionTime"]) - parse_time(run.status["startTime"])


def until_queued(run: Run, words: str, attempt: int = 1, *, index: int = 0) -> None:
    """Held back by Kueue, in its words."""
    until(lambda: run.condition("Stuck") == ("True", "Queued", words), told=run.describe)
    state = "Starting" if attempt == 1 else "Restarting"
    assert run.at(index) == (state, attempt)
    assert run.status["summary"]["reason"] == "Queued"


def test_runs_take_turns_one_stage_at_a_time(place, kueue):
    first = enqueue(place, "first", "until", "turns", stages=2)
    first.until_at("Running")
    second = enqueue(place, "second", "until", "turns")
    until_queued(second, f"Kueue's queue turns: {FULL}")
    assert second.children(PODS) == []
    assert find_workloads(first) == ["first-draw-a-1"], "a stage queues when its turn has come"
    [pod] = first.children(PODS)
    assert pod["spec"]["nodeSelector"] == FLAVOR["nodeSelector"]
    assert FLAVOR["tolerations"][0] in pod["spec"]["tolerations"]

    first.release("draw-a")
    second.until_at("Running")
    assert not second.is_true("Stuck")
    until(lambda: first.condition("Stuck")[1] == "Queued")
    assert (first.at(0), first.at(1)) == (("Succeeded", 1), ("Starting", 1))

    second.release()
    second.until_true("Succeeded")
    first.until_at("Running", index=1)
    first.release("draw-b")
    first.until_true("Succeeded")
    turns = [name for name in kueue.let_go if name in first.jobs + second.jobs]
    assert turns == ["first-draw-a-1", "second-draw-a-1", "first-draw-b-1"]
    assert second.journal == ["draw-a 1 0 began", "draw-a 1 0 done"]
    ledger = second.status["goodput"]["seconds"]
    assert abs(ledger["queued"] - count_waited(second)) <= 2
    assert abs(sum(ledger.values()) - count_active(second)) <= 1


def test_a_preempted_run_saves_and_goes_on_in_its_turn(place, kueue, important):
    lesser = enqueue(place, "lesser", "slow", "taken")
    lesser.until_at("Running")
    greater = enqueue(place, "greater", "until", "taken", workers={"priorityClassName": important})
    greater.until_at("Running")
    lesser.until_at("Restarting", 2)
    stage = lesser.stage()
    assert (stage["lastFailure"]["cause"], stage["lastFailure"]["exitCode"]) == ("Preempted", 75)
    assert stage["restarts"] == {"Preempted": 1}
    assert lesser.journal == ["draw-a 1 0 began", "draw-a 1 0 told", "draw-a 1 0 saved"]
    until(lambda: lesser.jobs == ["lesser-draw-a-2"] and lesser.condition("Stuck")[1] == "Queued")
    greater.release()
    greater.until_true("Succeeded")
    lesser.until_at("Running", 2)
    until(lambda: lesser.journal[3:] == ["draw-a 2 0 began"])
    assert "lost" not in lesser.status["goodput"]["seconds"]
    assert lesser.status["goodput"].get("lostSteps", 0) == 0
    lesser.delete()


def test_a_place_that_is_taken_and_given_back_at_once(place, kueue):
    run = enqueue(place, "returned", "slow", "returned", nodes=2)
    run.until_at("Running")
    kueue.to_evict.add("returned-draw-a-1")
    run.until_at("Running", 2)
    assert run.stage()["restarts"] == {"Preempted": 1}
    until(lambda: run.jobs == ["returned-draw-a-2"] and len(run.children(PODS)) == 2, told=run.describe)
    of_first = [f"draw-a 1 {index} {word}" for word in ("began", "told", "saved") for index in (0, 1)]
    of_second = ["draw-a 2 0 began", "draw-a 2 1 began"]
    until(lambda: sorted(run.journal) == sorted(of_first + of_second), told=run.describe)
    run.delete()


def test_a_suspended_run_gives_its_place_back_and_queues_again(place, kueue):
    run, other = (enqueue(place, name, "slow", "paused") for name in ("paused", "waiting"))
    run.until_at("Running")
    other.edit(suspend=True)  # while it waits
    other.until_true("Suspended")
    until(lambda: find_workloads(other) == [])
    assert other.journal == []

    run.edit(suspend=True)  # while it runs
    run.until_true("Suspended")
    assert run.journal == ["draw-a 1 0 began", "draw-a 1 0 told", "draw-a 1 0 saved"]
    assert (run.jobs, find_workloads(run)) == ([], [])
    other.edit(suspend=False)
    other.until_at("Running", 2)
    run.edit(suspend=False)
    until(lambda: run.jobs == ["paused-draw-a-2"] and run.condition("Stuck")[1] == "Queued")
    other.delete()
    run.until_at("Running", 2)
    run.delete()


def test_a_run_that_is_deleted_in_the_queue_leaves_nothing(place, kueue):
    run = enqueue(place, "deleted", "hold", "full")
    until(lambda: find_workloads(run) == ["deleted-draw-a-1"])
    run.delete()
    until(lambda: run.count_children() == 0 and find_workloads(run) == [])


def test_a_job_that_is_removed_from_the_queue_queues_again(place, kueue):
    run = enqueue(place, "removed", "hold", "gone")
    until(lambda: run.condition("Stuck")[1] == "Queued")
    [job] = run.children(JOBS)
    run.api.delete(JOBS, job["metadata"]["name"], place.namespace)
    until(lambda: [j["metadata"]["uid"] for j in run.children(JOBS)] not in ([], [job["metadata"]["uid"]]))
    run.delete()


def test_no_timeout_runs_in_a_queue(place, kueue, homeless):
    until_queued(homeless, "Kueue's queue nowhere: LocalQueue nowhere doesn't exist")
    end = parse_time(homeless.status["startTime"]) + TIMEOUT + 2
    until(lambda: time.time() > end)
    assert homeless.at() == ("Starting", 1)
    assert homeless.jobs == ["homeless-draw-a-1"]
    homeless.edit(restartPolicy={"startTimeoutSeconds": 600}, activeDeadlineSeconds=600)  # they count from here on

    serve_workloads(place.api, "v1beta1")  # as an older Kueue does
    kueue.workloads, kueue.quotas["nowhere"] = at_version("v1beta1"), 0
    until_queued(homeless, f"Kueue's queue nowhere: {FULL}")
    kueue.quotas["nowhere"] = 1
    homeless.until_at("Running")
    assert not homeless.is_true("Stuck")
    homeless.delete()
