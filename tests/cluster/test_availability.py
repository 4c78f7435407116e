"""Two replicas and a lease: whatever happens to the leader, the standby takes over, and never do both write."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from sailvl_operator.cluster.resources import PODS
from tests.support.live.api import ClusterApi, wait_until
from tests.support.live.cluster import Cluster
from tests.support.live.proxy import FaultyProxy
from tests.support.live.replicas import FAST_FLAGS, AttemptRecorder, OperatorReplica
from tests.support.live.stub_runs import StubRun, Workspace, build_stub_image, open_workspace

pytestmark = pytest.mark.cluster

SLACK_SECONDS = 4.0
"""Extra time for a busy machine."""
DURATION, DEADLINE, INTERVAL = (
    float(str(FAST_FLAGS[name]))
    for name in ("lease-duration-seconds", "lease-renew-deadline-seconds", "lease-renew-interval-seconds")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxiedReplica:
    """A replica behind a proxy of its own."""

    replica: OperatorReplica
    proxy: FaultyProxy


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPair:
    """The leader and its standby."""

    workspace: Workspace
    recorder: AttemptRecorder
    leader: ProxiedReplica
    standby: ProxiedReplica

    def delete_first_pod(self, run: StubRun) -> None:
        """Delete a pod of the first attempt, as another client."""
        [pod] = [p for p in run.list_owned(PODS) if p["metadata"]["name"].startswith(f"{run.name}-draw-a-1-0")]
        self.workspace.api.delete(PODS, pod["metadata"]["name"], self.workspace.namespace)

    def check_takeover(self, run: StubRun, attempts: int) -> None:
        """Require that the standby leads and that the run has this many attempts, each with one Job."""
        self.standby.replica.wait_until_leading(DURATION + INTERVAL + SLACK_SECONDS)
        run.wait_for_stage("Running", attempts)
        assert self.recorder.list_attempts(self.workspace.namespace, run.name) == {
            "draw-a": list(range(1, attempts + 1))
        }
        assert self.recorder.list_unrecorded_attempts(self.workspace.namespace, run.name) == []


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    return build_stub_image(cluster.registry)


@pytest.fixture(scope="module")
def workspace(cluster: Cluster, resource: None, image: str) -> Iterator[Workspace]:
    with ClusterApi(cluster.kubeconfig) as api, open_workspace(api, image, prefix="replicas") as workspace:
        yield workspace


@pytest.fixture(scope="module")
def replicas(
    cluster: Cluster, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ProxiedReplica]]:
    """Start both replicas once for all tests; `pair` restarts one that has ended."""
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultyProxy(cluster.kubeconfig, folder, seed=seed)) for seed in (1, 2)]
        yield [
            ProxiedReplica(
                replica=stack.enter_context(
                    OperatorReplica(p.kubeconfig, [workspace.namespace], folder, identity=name)
                ),
                proxy=p,
            )
            for name, p in zip(("first", "second"), proxies, strict=True)
        ]


@pytest.fixture
def pair(cluster: Cluster, workspace: Workspace, replicas: list[ProxiedReplica]) -> Iterator[ReplicaPair]:
    for each in replicas:
        if not each.replica.is_alive():
            each.replica.start()
    for each in replicas:
        each.replica.wait_until_ready()
    wait_until(lambda: any(each.replica.is_leading() for each in replicas))
    standby, leader = sorted(replicas, key=lambda each: each.replica.is_leading())
    with AttemptRecorder(cluster.kubeconfig, [workspace.namespace]) as recorder:
        yield ReplicaPair(workspace=workspace, recorder=recorder, leader=leader, standby=standby)


def test_standby_takes_over_from_killed_leader(pair: ReplicaPair):
    run = StubRun(pair.workspace, "killed", nodes=2)
    run.wait_for_stage("Running")
    pair.leader.replica.stop(signal.SIGKILL)
    pair.delete_first_pod(run)
    pair.check_takeover(run, 2)


def test_terminated_leader_releases_lease(pair: ReplicaPair):
    run = StubRun(pair.workspace, "terminated", nodes=2)
    run.wait_for_stage("Running")
    terminated = time.monotonic()
    pair.leader.replica.process.send_signal(signal.SIGTERM)
    pair.standby.replica.wait_until_leading()
    assert time.monotonic() - terminated < DURATION, "the lease was not released"
    assert pair.leader.replica.process.wait(10) == 0
    pair.check_takeover(run, 1)


def test_partitioned_leader_exits_without_writing(pair: ReplicaPair):
    run = StubRun(pair.workspace, "cut-off", nodes=2)
    run.wait_for_stage("Running")
    pair.leader.proxy.cut(silent=True)
    written = len(pair.leader.proxy.writes)
    pair.delete_first_pod(run)
    assert pair.leader.replica.process.wait(DEADLINE + SLACK_SECONDS) == 1
    pair.check_takeover(run, 2)
    pair.leader.proxy.restore()
    time.sleep(1.0)
    assert pair.leader.proxy.writes[written:] == []


def test_stopped_leader_exits_without_writing_when_resumed(pair: ReplicaPair):
    run = StubRun(pair.workspace, "stopped", nodes=2)
    run.wait_for_stage("Running")
    pair.leader.replica.process.send_signal(signal.SIGSTOP)
    written = len(pair.leader.proxy.writes)
    pair.delete_first_pod(run)
    pair.check_takeover(run, 2)
    pair.leader.replica.process.send_signal(signal.SIGCONT)
    assert pair.leader.replica.process.wait(SLACK_SECONDS) == 1
    assert pair.leader.proxy.writes[written:] == []
    pair.check_takeover(run, 2)
