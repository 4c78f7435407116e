"""Who reaches the workers of a run on a cluster that enforces NetworkPolicies, with the policy and without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.cluster.resources import NETWORK_POLICIES, PODS
from tests.cluster.test_cluster import build_pod
from tests.support.live.api import NAMESPACES, ClusterApi, build_object, wait_until
from tests.support.live.cluster import Cluster, Kubectl
from tests.support.live.replicas import OperatorReplica
from tests.support.live.stub_runs import StubRun, Workspace, build_stub_image, open_workspace

pytestmark = pytest.mark.cluster

RENDEZVOUS, METRICS = 29500, 9400
RUN = "protected"
ALL = {(worker, port) for worker in (0, 1) for port in (RENDEZVOUS, METRICS)}
ONLY_METRICS = {(worker, METRICS) for worker in (0, 1)}
NOTHING: set[tuple[int, int]] = set()
CLIENT = "exec /bin/busybox sleep 3600"


@dataclass(frozen=True, kw_only=True, slots=True)
class PodNetwork:
    """The pods from which connections are tried, and the run whose workers listen."""

    kubectl: Kubectl
    run: StubRun
    namespaces: dict[str, str]
    """Namespace of each client."""

    def list_reached(self, client: str) -> set[tuple[int, int]]:
        """Return worker and port of every listener that answers a pod; all are tried at once."""
        addresses = [self._get_worker(index)["status"]["podIP"] for index in (0, 1)]
        script = (
            "for a in $1 $2; do for p in 29500 9400; do (/bin/busybox nc -w 2 $a $p | sed s/$/:$p/) & done; done; wait"
        )
        script = script.replace("sed", "/bin/busybox sed")
        command = ["exec", client, "--", "/bin/busybox", "sh", "-c", script, "sh", *addresses]
        done = self.kubectl("-n", self.namespaces.get(client, self.run.workspace.namespace), *command)
        assert done.returncode == 0, done.stderr
        answers = [line.rpartition(":") for line in done.stdout.split()]
        return {(int(host.rpartition("-")[2]), int(port)) for host, _, port in answers}

    def wait_until_reached(self, client: str, expected: set[tuple[int, int]]) -> None:
        """Wait until a pod reaches what it should."""
        wait_until(lambda: self.list_reached(client) == expected, 20, describe=lambda: self.list_reached(client))

    def get_worker_name(self, index: int) -> str:
        """Return the name of a worker's pod."""
        return str(self._get_worker(index)["metadata"]["name"])

    def _get_worker(self, index: int) -> dict[str, Any]:
        label = "batch.kubernetes.io/job-completion-index"
        return next(pod for pod in self.run.list_owned(PODS) if pod["metadata"]["labels"].get(label) == str(index))


def build_peers(namespace: str, *apps: str) -> str:
    """Return the value of --metrics-peers: pods of a namespace that have one of some labels `app`."""
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    return json.dumps([{"namespaceSelector": selector, "podSelector": {"matchLabels": {"app": app}}} for app in apps])


@pytest.fixture(scope="module")
def workspace(cluster: Cluster, kubeconfig: str, resource: None) -> Iterator[Workspace]:
    if not cluster.is_ours:
        pytest.skip("the test needs enforced NetworkPolicies, as in the cluster of `make cluster`")
    image = build_stub_image(cluster.registry)
    with ClusterApi(kubeconfig) as api, open_workspace(api, image, prefix="network") as workspace:
        yield workspace


@pytest.fixture(scope="module", autouse=True)
def operator(
    workspace: Workspace, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorReplica]:
    peers = build_peers(f"{workspace.namespace}-monitoring", "operator", "prometheus")
    folder = tmp_path_factory.mktemp("operator")
    with OperatorReplica(kubeconfig, [workspace.namespace], folder, grace_seconds=1, metrics_peers=peers) as operator:
        operator.wait_until_ready()
        yield operator


@pytest.fixture(scope="module")
def network(workspace: Workspace, kubectl: Kubectl, operator: OperatorReplica) -> Iterator[PodNetwork]:
    """Start the run, and the pods that try to connect: on both nodes, and in three namespaces."""
    own, others = workspace.namespace, [f"{workspace.namespace}-{name}" for name in ("stranger", "monitoring")]
    clients = {
        "stranger-0": (others[0], "node-0", {}),
        "stranger-1": (others[0], "node-1", {}),
        "neighbour": (own, "node-0", {"sailvl.dev/run": RUN}),
        "operator": (others[1], "node-0", {"app": "operator"}),
        "prometheus": (others[1], "node-1", {"app": "prometheus"}),
        "exporter": (others[1], "node-1", {"app": "exporter"}),
    }
    for name in others:
        workspace.api.create(NAMESPACES, build_object("Namespace", name))
    for name, (namespace, node, labels) in clients.items():
        pod = build_pod(name, node, workspace.image, CLIENT)
        pod["metadata"] |= {"namespace": namespace, "labels": labels}
        workspace.api.create(PODS, pod)
    run = StubRun(workspace, RUN, "serve", nodes=2)
    run.wait_for_stage("Running")
    for name, (namespace, _, _) in clients.items():
        kubectl("-n", namespace, "wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s")
    yield PodNetwork(
        kubectl=kubectl, run=run, namespaces={name: namespace for name, (namespace, _, _) in clients.items()}
    )
    run.delete()
    for name in others:
        workspace.api.delete(NAMESPACES, name)


def test_workers_of_a_run_reach_each_other_on_all_ports(network: PodNetwork) -> None:
    network.wait_until_reached(network.get_worker_name(0), ALL)
    network.wait_until_reached(network.get_worker_name(1), ALL)


@pytest.mark.parametrize("client", ["operator", "prometheus"])
def test_metrics_peer_reaches_only_the_metrics_port(network: PodNetwork, client: str) -> None:
    network.wait_until_reached(client, ONLY_METRICS)


@pytest.mark.parametrize(
    "client",
    [
        pytest.param("stranger-0", id="another namespace, node 0"),
        pytest.param("stranger-1", id="another namespace, node 1"),
        pytest.param("neighbour", id="same namespace and name of the run, without its UID"),
        pytest.param("exporter", id="namespace of Prometheus, other labels"),
    ],
)
def test_other_pod_reaches_no_worker(network: PodNetwork, client: str) -> None:
    network.wait_until_reached(network.get_worker_name(0), ALL)  # the workers listen
    network.wait_until_reached(client, NOTHING)


def test_everyone_reaches_the_workers_while_the_policy_is_disabled(network: PodNetwork) -> None:
    network.run.edit(network={"policy": "Disabled"})
    for client in ("stranger-0", "stranger-1", "neighbour"):
        network.wait_until_reached(client, ALL)
    assert not network.run.list_owned(NETWORK_POLICIES)
    network.run.edit(network={"policy": "Enabled"})
    for client in ("stranger-0", "stranger-1", "neighbour"):
        network.wait_until_reached(client, NOTHING)


def test_changed_peers_are_carried_into_the_policies_of_running_runs(
    network: PodNetwork, operator: OperatorReplica, kubeconfig: str, tmp_path: Path
) -> None:
    network.wait_until_reached("exporter", NOTHING)
    network.wait_until_reached("prometheus", ONLY_METRICS)
    operator.stop()
    scope, peers = [network.run.workspace.namespace], build_peers(network.namespaces["exporter"], "exporter")
    with OperatorReplica(kubeconfig, scope, tmp_path, identity="other", metrics_peers=peers):
        network.wait_until_reached("exporter", ONLY_METRICS)
        network.wait_until_reached("prometheus", NOTHING)
    operator.start()
    operator.wait_until_ready()
