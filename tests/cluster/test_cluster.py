"""The cluster of `make cluster` itself: pods on every node reach each other by name, and failed nodes return."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.live.api import wait_until
from tests.support.live.cluster import Cluster

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "hack/cluster/cluster.sh"
PORT = 9400
Kubectl = Callable[..., subprocess.CompletedProcess[str]]
SERVE = f"/bin/busybox nc -ll -p {PORT} -e /bin/busybox hostname"
REACH_PEERS = f"""
b=/bin/busybox
$b nslookup kubernetes.default.svc.cluster.local >/dev/null && echo resolved
printf 'GET / HTTP/1.0\\r\\n\\r\\n' | $b nc -w 5 kubernetes.default 443 | $b grep -o 'HTTPS server'
for i in $($b seq 40); do $b nc -w 2 server.peers {PORT} 2>/dev/null && break; $b sleep 0.5; done
"""


def build_pod(name: str, node: str, image: str, script: str, **security: Any) -> dict[str, Any]:
    """Return a pod that is reachable as NAME.peers; `security` overrides the restricted Pod Security Standard."""
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} | security
    container = {"name": "main", "image": image, "command": ["/bin/busybox", "sh", "-c", script]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "peers"}},
        "spec": {
            "restartPolicy": "Never",
            "hostname": name,
            "subdomain": "peers",
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container | {"securityContext": context}],
        },
    }


def build_service() -> dict[str, Any]:
    spec = {"clusterIP": "None", "selector": {"app": "peers"}, "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "peers"}, "spec": spec}


def create(kubectl: Kubectl, namespace: str, *objects: dict[str, Any]) -> None:
    bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    created = kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(bundle))
    assert created.returncode == 0, created.stderr


def list_ready_conditions(kubectl: Kubectl) -> dict[str, str]:
    """Return the status of each node's Ready condition."""
    template = '{range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status}{"\\n"}{end}'
    listed = kubectl("get", "nodes", "-o", f"jsonpath={template}")
    return dict(line.split("=", 1) for line in listed.stdout.split())


def test_pods_on_every_node_reach_dns_api_server_and_each_other(
    kubectl: Kubectl, cluster: Cluster, namespace: str
) -> None:
    nodes = [name for name, ready in list_ready_conditions(kubectl).items() if ready == "True"]
    image = f"{cluster.registry}/busybox:1"
    clients = [build_pod(f"ask-{node}", node, image, REACH_PEERS) for node in nodes]
    create(kubectl, namespace, build_service(), build_pod("server", nodes[0], image, SERVE), *clients)
    for node in nodes:
        waited = kubectl(
            "-n", namespace, "wait", f"pod/ask-{node}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=90s"
        )
        assert waited.returncode == 0, kubectl("-n", namespace, "describe", "pod", f"ask-{node}").stdout[-2000:]
        log = kubectl("-n", namespace, "logs", f"ask-{node}").stdout.split("\n")
        assert log[:3] == ["resolved", "HTTPS server", "server"]


def test_restricted_namespace_rejects_privilege_escalation(kubectl: Kubectl, cluster: Cluster, namespace: str) -> None:
    pod = build_pod("root", "node-0", f"{cluster.registry}/busybox:1", "true", allowPrivilegeEscalation=True)
    refused = kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(pod))
    assert refused.returncode != 0
    assert "violates PodSecurity" in refused.stderr


def test_start_fails_early_without_disk_space(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.is_ours:
        pytest.skip("the test mounts a small file system: it needs the machine of `make cluster`")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", tmp_path], check=True)
    try:
        environment = os.environ | {"ROOT": str(tmp_path)}
        up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False, timeout=60)
        files = {path.name for path in tmp_path.iterdir()}
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert up.returncode == 1, up.stderr
    assert "20 GB are needed" in up.stderr
    assert files <= {"pki", "log", ".lock"}


@pytest.mark.slow
def test_node_without_power_becomes_unknown_and_returns(kubectl: Kubectl, cluster: Cluster, namespace: str) -> None:
    if not cluster.is_ours:
        pytest.skip("a node is killed only in the cluster of `make cluster`")

    def call_script(verb: str) -> None:
        subprocess.run([SCRIPT, verb, "7"], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=180)

    def get_phase() -> str:
        return kubectl("-n", namespace, "get", "pod", "server", "-o", "jsonpath={.status.phase}").stdout

    call_script("add-node")
    try:
        create(kubectl, namespace, build_pod("server", "node-7", f"{cluster.registry}/busybox:1", SERVE))
        wait_until(lambda: get_phase() == "Running", 60)
        call_script("kill-node")
        wait_until(lambda: list_ready_conditions(kubectl)["node-7"] == "Unknown", 60)
        call_script("add-node")
        assert list_ready_conditions(kubectl)["node-7"] == "True"
        wait_until(lambda: get_phase() in ("Failed", "Succeeded", ""), 60)  # the power loss ended its containers
    finally:
        call_script("remove-node")
