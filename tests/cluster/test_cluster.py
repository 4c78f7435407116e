"""The cluster itself has what the runs need: pods on every node that find each other by name, and nodes that fail."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "hack/cluster/cluster.sh"
PORT = 9400
Kubectl = Callable[..., subprocess.CompletedProcess[str]]
SERVE = f"/bin/busybox nc -ll -p {PORT} -e /bin/busybox hostname"
ASK = f"""
b=/bin/busybox
$b nslookup kubernetes.default.svc.cluster.local >/dev/null && echo resolved
printf 'GET / HTTP/1.0\\r\\n\\r\\n' | $b nc -w 5 kubernetes.default 443 | $b grep -o 'HTTPS server'
for i in $($b seq 40); do $b nc -w 2 server.peers {PORT} 2>/dev/null && break; $b sleep 0.5; done
"""


class Cluster(Protocol):
    registry: str
    is_ours: bool


def build_pod(name: str, node: str, image: str, script: str, **security: Any) -> dict[str, Any]:
    """Within the restricted Pod Security Standard unless `security` says otherwise; found as NAME.peers."""
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


def ready_nodes(kubectl: Kubectl) -> dict[str, str]:
    """The status of each node's Ready condition."""
    template = '{range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status}{"\\n"}{end}'
    listed = kubectl("get", "nodes", "-o", f"jsonpath={template}")
    return dict(line.split("=", 1) for line in listed.stdout.split())


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


def test_pods_of_every_node_find_dns_the_api_server_and_each_other(
    kubectl: Kubectl, cluster: Cluster, namespace: str
) -> None:
    nodes = [name for name, ready in ready_nodes(kubectl).items() if ready == "True"]
    image = f"{cluster.registry}/busybox:1"
    asking = [build_pod(f"ask-{node}", node, image, ASK) for node in nodes]
    create(kubectl, namespace, build_service(), build_pod("server", nodes[0], image, SERVE), *asking)
    for node in nodes:
        waited = kubectl(
            "-n", namespace, "wait", f"pod/ask-{node}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=90s"
        )
        assert waited.returncode == 0, kubectl("-n", namespace, "describe", "pod", f"ask-{node}").stdout[-2000:]
        said = kubectl("-n", namespace, "logs", f"ask-{node}").stdout.split("\n")
        assert said[:3] == ["resolved", "HTTPS server", "server"]


def test_a_restricted_namespace_refuses_a_pod_that_may_gain_rights(
    kubectl: Kubectl, cluster: Cluster, namespace: str
) -> None:
    pod = build_pod("root", "node-0", f"{cluster.registry}/busybox:1", "true", allowPrivilegeEscalation=True)
    refused = kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(pod))
    assert refused.returncode != 0
    assert "violates PodSecurity" in refused.stderr


def test_too_little_room_for_the_images_is_said_before_anything_starts(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.is_ours:
        pytest.skip("the test mounts a small file system: it needs the machine of `make cluster`")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", tmp_path], check=True)
    try:
        environment = os.environ | {"ROOT": str(tmp_path)}
        up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False, timeout=60)
        left = {path.name for path in tmp_path.iterdir()}
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert up.returncode == 1, up.stderr
    assert "needs 20 GB of room" in up.stderr
    assert left <= {"pki", "log", ".lock"}


@pytest.mark.slow
def test_a_node_that_loses_its_power_is_noticed_and_comes_back(
    kubectl: Kubectl, cluster: Cluster, namespace: str
) -> None:
    if not cluster.is_ours:
        pytest.skip("a node is killed only in the cluster of `make cluster`")

    def script(verb: str) -> None:
        subprocess.run([SCRIPT, verb, "7"], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=180)

    def phase() -> str:
        return kubectl("-n", namespace, "get", "pod", "server", "-o", "jsonpath={.status.phase}").stdout

    script("add-node")
    try:
        create(kubectl, namespace, build_pod("server", "node-7", f"{cluster.registry}/busybox:1", SERVE))
        until(lambda: phase() == "Running", 60)
        script("kill-node")
        until(lambda: ready_nodes(kubectl)["node-7"] == "Unknown", 60)
        script("add-node")
        assert ready_nodes(kubectl)["node-7"] == "True"
        until(lambda: phase() in ("Failed", "Succeeded", ""), 60)  # what ran there isn't believed to run on
    finally:
        script("remove-node")
