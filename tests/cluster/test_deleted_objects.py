"""Owned objects that a user deletes on a real cluster are created again while their run needs them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sailvl_operator.cluster.resources import JOBS, NETWORK_POLICIES, PODS, SERVICES, Resource
from tests.support.live.api import ClusterApi, Object, wait_until
from tests.support.live.replicas import OperatorReplica
from tests.support.live.stub_runs import (
    StubRun,
    Workspace,
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
    with ClusterApi(kubeconfig) as api, open_workspace(api, image, prefix="deletions") as workspace:
        yield workspace


@pytest.fixture(scope="module", autouse=True)
def operator(
    workspace: Workspace, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorReplica]:
    with open_operator(kubeconfig, [workspace], tmp_path_factory.mktemp("operator")) as operator:
        yield operator


def suspend(run: StubRun) -> None:
    run.edit(suspend=True)
    run.wait_for_condition("Suspended")


def resume(run: StubRun) -> None:
    run.edit(suspend=False)


def wait_for_running(run: StubRun) -> None:
    run.wait_for_stage("Running")


def finish_first_stage(run: StubRun) -> None:
    run.release("draw-a")
    run.wait_for_stage("Running", index=1)


def wait_for_stuck(run: StubRun) -> None:
    run.wait_for_condition("Stuck")


def do_nothing(run: StubRun) -> None:
    """Leave the run as it is."""


UNSCHEDULABLE = {"resources": {"requests": {"cpu": "1000"}}}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionCase:
    """A user deletes an owned object of a run."""

    name: str
    """Name of the run."""
    kind: Resource
    when: Callable[[StubRun], None]
    """Brings the run into the state in which the object is deleted."""
    then: Callable[[StubRun], None] = do_nothing
    state: tuple[str, int]
    """State and attempt of the first stage afterwards."""
    restarts: Object = field(default_factory=dict)
    jobs: tuple[str, ...]
    """The remaining Jobs, without the run's name."""


SAVED = {"Preempted": 1}
"""The workers save on SIGTERM, as for an eviction."""
FINISHED_JOBS = ("draw-a-1", "draw-b-1")
DELETIONS = [
    DeletionCase(
        name="job", kind=JOBS, when=wait_for_running, state=("Running", 2), restarts=SAVED, jobs=("draw-a-2",)
    ),
    DeletionCase(
        name="pod", kind=PODS, when=wait_for_running, state=("Running", 2), restarts=SAVED, jobs=("draw-a-2",)
    ),
    DeletionCase(name="service", kind=SERVICES, when=wait_for_running, state=("Running", 1), jobs=("draw-a-1",)),
    DeletionCase(name="policy", kind=NETWORK_POLICIES, when=wait_for_running, state=("Running", 1), jobs=("draw-a-1",)),
    DeletionCase(name="paused-job", kind=JOBS, when=suspend, then=resume, state=("Running", 2), jobs=("draw-a-2",)),
    DeletionCase(
        name="paused-service", kind=SERVICES, when=suspend, then=resume, state=("Running", 2), jobs=("draw-a-2",)
    ),
    DeletionCase(
        name="finished-job", kind=JOBS, when=finish_first_stage, state=("Succeeded", 1), jobs=FINISHED_JOBS[1:]
    ),
    DeletionCase(name="finished-pod", kind=PODS, when=finish_first_stage, state=("Succeeded", 1), jobs=FINISHED_JOBS),
    DeletionCase(
        name="new-job",
        kind=JOBS,
        when=wait_for_stuck,
        state=("Restarting", 2),
        restarts={"Infra": 1},
        jobs=("draw-a-2",),
    ),
]


@pytest.fixture(scope="module")
def runs_by_case(workspace: Workspace, operator: OperatorReplica) -> Iterator[dict[str, StubRun]]:
    """Create a run for each case, all at once."""
    runs = {}
    for case in DELETIONS:
        workers = UNSCHEDULABLE if case.when is wait_for_stuck else None
        stages = 2 if case.when is finish_first_stage else 1
        runs[case.name] = StubRun(workspace, case.name, "until", nodes=2, stages=stages, workers=workers)
    yield runs
    for run in runs.values():
        run.delete()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in DELETIONS])
def test_deleted_object_is_replaced(case: DeletionCase, runs_by_case: dict[str, StubRun]) -> None:
    run = runs_by_case[case.name]
    case.when(run)
    victim = next(child["metadata"] for child in run.list_owned(case.kind) if "draw-b" not in child["metadata"]["name"])
    run.api.delete(case.kind, victim["name"], run.workspace.namespace)
    wait_until(lambda: victim["uid"] not in [child["metadata"]["uid"] for child in run.list_owned(case.kind)])
    case.then(run)
    wait_until(
        lambda: (run.stage_state(), run.jobs) == (case.state, [f"{run.name}-{job}" for job in case.jobs]),
        describe=run.describe,
    )
    wait_until(lambda: len(run.list_owned(SERVICES)) == len(run.list_owned(NETWORK_POLICIES)) == 1)
    time.sleep(2)  # enough time for an unwanted reaction to start
    assert (run.stage_state(), run.stage().get("restarts", {})) == (case.state, case.restarts)
    assert run.jobs == [f"{run.name}-{job}" for job in case.jobs]


def test_finished_runs_stay_unchanged_without_jobs_and_after_operator_restart(workspace, operator):
    done, failed = StubRun(workspace, "latched", "succeed", stages=2), StubRun(workspace, "latched-wrong", "config")
    done.wait_for_condition("Succeeded")
    failed.wait_for_condition("Failed")
    wait_until(lambda: failed.jobs == [])
    for job in done.jobs:
        workspace.api.delete(JOBS, job, workspace.namespace)
    wait_until(lambda: done.list_owned(JOBS) == done.list_owned(PODS) == [])
    versions = [run.raw["metadata"]["resourceVersion"] for run in (done, failed)]
    operator.stop(signal.SIGKILL)
    operator.start()
    wait_until(lambda: operator.read_metric("sailvl_operator_reconciles_total") >= 2)
    time.sleep(2)
    assert [run.raw["metadata"]["resourceVersion"] for run in (done, failed)] == versions
    assert (done.jobs, failed.jobs) == ([], [])
    assert done.journal == [
        f"{stage} 1 0 {event}" for stage in ("draw-a", "draw-b") for event in ("started", "finished")
    ]
