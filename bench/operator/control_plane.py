"""Control plane of the benchmark: the one of the tests, with the scheduler, and kwok in place of kubelets.

Its ports are free ones, so that it runs beside the cluster of `make cluster`. Its folder is removed at the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from ssl import create_default_context
from types import TracebackType

from bench.operator.worker_servers import HonestWorkers
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.cluster.resources import CLAIMS, RUNS, Resource
from sailvl_operator.errors import ApiError
from tests.support.live.control_plane import ControlPlaneProcesses, ControlPlaneProfile

ROOT = Path(__file__).parents[2]
POD_ADDRESS = "192.0.2.1"
"""Address of all pods, which is added to this machine while the control plane runs, because Endpoints may not contain a
loopback address. One server there answers for every worker, with progress of no attempt, so that it is read and changes
nothing."""
HOSTILE_NAMESPACE = "hostile"
HOSTILE_ADDRESS = "192.0.2.2"
"""Address of all pods in the hostile namespace."""
NODES = 20
QPS = 500
GOGC = "400"
"""Garbage collection target of the Go programs, which share the cores with the operator: trade memory for CPU."""

CLIENT_LIMITS = {"kube_api_qps": QPS, "kube_api_burst": QPS * 3 // 2}

PROFILE = ControlPlaneProfile(
    etcd={"quota_backend_bytes": 8 << 30},  # of large objects, which are written many times
    api_server={"advertise_address": "127.0.0.1", "endpoint_reconciler_type": "none"},
    controller_manager={
        "controllers": "*,-node-lifecycle-controller",  # the leases of fake nodes are never renewed
        "use_service_account_credentials": "true",
        "pvclaimbinder_sync_period": "1s",
        **CLIENT_LIMITS,
    },
    scheduler=CLIENT_LIMITS,
    environment={"GOGC": GOGC},
)
LIMITS = f"controller manager and scheduler: --kube-api-qps={QPS} --kube-api-burst={QPS * 3 // 2}"
"""Flags that differ from Kubernetes' defaults and limit how fast pods are created; printed with the results."""

NAMESPACE_KIND = Resource(api_version="v1", plural="namespaces")
NODE_KIND = Resource(api_version="v1", plural="nodes")
ACCOUNT_KIND = Resource(api_version="v1", plural="serviceaccounts")
VOLUME_KIND = Resource(api_version="v1", plural="persistentvolumes")

_READY = """
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.podIP, operator: DoesNotExist}
  delay: {durationMilliseconds: 1000, jitterDurationMilliseconds: 5000}
  next:
    statusTemplate: |
      {{ $now := Now }}
      conditions:
      - {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
      - {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
      - {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
      containerStatuses:
      {{ range .spec.containers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        imageID: ""
        ready: true
        restartCount: 0
        state: {running: {startedAt: {{ $now | Quote }}}}
      {{ end }}
      hostIP: 127.0.0.1
      podIP: {{ if eq .metadata.namespace "HOSTILE_NAMESPACE" }}HOSTILE_ADDRESS{{ else }}POD_ADDRESS{{ end }}
      phase: Running
      startTime: {{ $now | Quote }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-delete}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: Exists}
  next: {delete: true}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-ready} # without a stage for nodes, kwok ignores them and their pods
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
    - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      phase: Running
"""
"""kwok's stages: pods run 1 to 5 s after they are scheduled, as in kwok's own, and disappear when they are deleted."""


_STAGE_VALUES = {
    "HOSTILE_NAMESPACE": HOSTILE_NAMESPACE,
    "HOSTILE_ADDRESS": HOSTILE_ADDRESS,
    "POD_ADDRESS": POD_ADDRESS,
}
"""Values of the names in `_READY`, in the order of their replacement."""


class ControlPlane:
    """Async context manager that starts and ends the control plane. `client` has an administrator's rights.

    `gogc`: garbage collection target of the Go programs.
    """

    def __init__(self, *, gogc: str = GOGC) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sailvl-bench-"))
        self._bin = Path(subprocess.check_output([ROOT / "hack/cluster/build.sh"], text=True).strip().splitlines()[-1])
        self._plane = ControlPlaneProcesses(self._bin, self.folder, replace(PROFILE, environment={"GOGC": gogc}))
        self.kubeconfig = self._plane.kubeconfig
        self.workers = HonestWorkers(POD_ADDRESS)
        self.client: Client

    async def __aenter__(self) -> ControlPlane:
        try:
            await self.workers.start()
            await asyncio.to_thread(self._plane.start)
            credentials = load_credentials(str(self.kubeconfig), "")
            self.client = await Client(
                credentials, ClientConfig(connections=64, request_timeout_seconds=60.0)
            ).__aenter__()
            await self._define()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.__aexit__(kind, error, trace)
        await self._stop()

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each component so far."""
        return {name: cpu_seconds(process.pid) for name, process in self._plane.processes.items()}

    def count_changes(self) -> Counter[str]:
        """Return the changes so far by kind, from the API server's metrics: a watch would disturb the measurement."""
        metrics = self._get("/metrics")
        pattern = r'^apiserver_watch_cache_events_received_total{group="[^"]*",resource="([^"]*)"} (\S+)'
        found = re.findall(pattern, metrics, re.M)
        return Counter({name.partition(".")[0]: round(float(count)) for name, count in found})

    def _get(self, path: str) -> str:
        """Return the body of a GET request to the API server."""
        trust = create_default_context(cafile=str(self._plane.certificate_authority))
        headers = {"Authorization": f"Bearer {self._plane.token}"}
        request = urllib.request.Request(f"{self._plane.server}{path}", headers=headers)
        with urllib.request.urlopen(request, context=trust, timeout=30) as answer:
            body: bytes = answer.read()
            return body.decode()

    async def _define(self) -> None:
        """Create the nodes and the CustomResourceDefinition, then start kwok."""
        await asyncio.gather(*(self._add_node(number) for number in range(NODES)))
        crd = ROOT / "crds/sailvlruns.yaml"
        kubectl: list[str | Path] = [self._bin / "kubectl", f"--kubeconfig={self.kubeconfig}"]
        subprocess.run([*kubectl, "apply", "--server-side", "-f", crd], check=True, capture_output=True)
        await self._wait_for(lambda: self._lists(RUNS))
        await self._prepare_namespace("default")
        config = self.folder / "kwok.yaml"
        stages = _READY
        for name, value in _STAGE_VALUES.items():
            stages = stages.replace(name, value)
        config.write_text(stages)
        flags = {"manage_all_nodes": "true", "kubeconfig": self.kubeconfig, "config": config}
        self._plane.start_program("kwok", flags | {"server_address": "127.0.0.1:11247"})

    async def _add_node(self, number: int) -> None:
        capacity = {"cpu": "1000", "memory": "1000Gi", "pods": "1000"}
        node = {"metadata": {"name": f"node-{number}"}, "spec": {}}
        await self.client.create(NODE_KIND, "", node)
        await self.client.patch(NODE_KIND, "", f"node-{number}", {"spec": {"taints": None}})  # the taint not-ready
        ready = {"type": "Ready", "status": "True", "reason": "Fake", "message": ""}
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        await self.client.patch(NODE_KIND, "", f"node-{number}", {"status": status}, subresource="status")

    async def create_namespace(self, name: str) -> None:
        """Create a namespace for runs."""
        await self.client.create(NAMESPACE_KIND, "", {"metadata": {"name": name}})
        await self._prepare_namespace(name)

    async def _prepare_namespace(self, namespace: str) -> None:
        """Wait for the account of a namespace's pods, and create the claim of its runs, without which they are not
        scheduled."""
        await self._wait_for(lambda: self.client.get(ACCOUNT_KIND, namespace, "default"))
        common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        name = f"sail-data-{namespace}"
        claim = {"namespace": namespace, "name": "sail-data"}
        volume = {"capacity": {"storage": "1Ti"}, "hostPath": {"path": "/sail-data"}, "claimRef": claim}
        await self.client.create(VOLUME_KIND, "", {"metadata": {"name": name}, "spec": common | volume})
        wanted = {"volumeName": name, "resources": {"requests": {"storage": "1Ti"}}}
        await self.client.create(CLAIMS, namespace, {"metadata": {"name": "sail-data"}, "spec": common | wanted})
        await self._wait_for(lambda: self._is_bound(namespace))

    async def _lists(self, resource: Resource) -> bool:
        async for _ in self.client.list_pages(resource):
            break
        return True

    async def _is_bound(self, namespace: str) -> bool:
        claim = await self.client.get(CLAIMS, namespace, "sail-data")
        return bool(claim.get("status", {}).get("phase") == "Bound")

    async def _wait_for(self, request: Callable[[], Awaitable[object]]) -> None:
        """Wait until a request to the API server returns a true value."""
        async with asyncio.timeout(60):
            while True:
                try:
                    if await request():
                        return
                except ApiError:
                    pass
                await asyncio.sleep(0.3)

    async def _stop(self) -> None:
        try:
            await self.workers.stop()
        finally:
            self._plane.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
