"""Runs whose start is blocked on a real cluster: the Stuck condition reports the cause, and unblocked runs succeed.

All causes are set up at once, each for a run of its own; then all are removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.live.api import ClusterApi, wait_until
from tests.support.live.blocked_starts import (
    BLOCKED_STARTS,
    BlockedStart,
    create_blocked_run,
    delete_cluster_objects,
    is_denied,
)
from tests.support.live.cluster import Kubectl
from tests.support.live.replicas import OperatorReplica
from tests.support.live.stub_runs import StubRun, Workspace, build_stub_image, open_operator, open_workspace

pytestmark = pytest.mark.cluster

EVERY = pytest.mark.parametrize("blocked", [pytest.param(each, id=each.name) for each in BLOCKED_STARTS])


@pytest.fixture(scope="module")
def workspaces(cluster: Any, kubeconfig: str, resource: None) -> Iterator[dict[str, Workspace]]:
    if not cluster.is_ours:
        pytest.skip("the test creates volumes from folders: it needs the cluster of `make cluster`")
    image = build_stub_image(cluster.registry)
    with ClusterApi(kubeconfig) as api, ExitStack() as stack:
        names = dict.fromkeys(blocked.workspace for blocked in BLOCKED_STARTS)
        yield {name: stack.enter_context(open_workspace(api, image, prefix="stuck")) for name in names}


@pytest.fixture(scope="module", autouse=True)
def operator(
    workspaces: dict[str, Workspace], kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorReplica]:
    folder = tmp_path_factory.mktemp("operator")
    with open_operator(kubeconfig, list(workspaces.values()), folder) as operator:
        yield operator


@pytest.fixture(scope="module")
def runs(operator: OperatorReplica, workspaces: dict[str, Workspace]) -> Iterator[dict[str, StubRun]]:
    """Create a run for each cause."""
    try:
        for blocked in BLOCKED_STARTS:
            blocked.block(workspaces[blocked.workspace], blocked.name)
        for name in ("no-pods", "no-jobs", "webhook-pods", "webhook-jobs"):
            wait_until(lambda name=name: is_denied(workspaces["common"], name))
        yield {each.name: create_blocked_run(each, workspaces[each.workspace]) for each in BLOCKED_STARTS}
    finally:
        delete_cluster_objects(workspaces["common"])


@pytest.fixture(scope="module")
def unblocked(workspaces: dict[str, Workspace], runs: dict[str, StubRun]) -> dict[str, StubRun]:
    """Remove every cause after its run has become Stuck."""
    for blocked in BLOCKED_STARTS:
        run = runs[blocked.name]
        wait_until(lambda run=run: run.is_true("Stuck"), describe=run.describe)
        blocked.unblock(run.workspace, run)
    return runs


@EVERY
def test_stuck_condition_reports_cause(blocked: BlockedStart, runs: dict[str, StubRun], kubectl: Kubectl) -> None:
    run = runs[blocked.name]
    wait_until(lambda: blocked.message in run.condition("Stuck")[2], describe=run.describe)
    assert run.condition("Stuck")[:2] == ("True", blocked.reason)
    row = kubectl("-n", run.workspace.namespace, "get", "svr", run.name, "--no-headers").stdout
    assert blocked.reason in row.split()
    wait_until(lambda: blocked.reason in run.list_event_reasons())
    assert not run.is_true("Failed")


@EVERY
def test_unblocked_run_succeeds(blocked: BlockedStart, unblocked: dict[str, StubRun]) -> None:
    run = unblocked[blocked.name]
    run.wait_for_condition("Succeeded")
    assert run.condition("Stuck") == ("False", "NotStuck", "")
    stage = run.stage()
    assert (stage["state"], stage["attempt"], stage.get("restarts", {})) == ("Succeeded", blocked.attempts, {})
