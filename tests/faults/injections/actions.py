"""Real faults as context managers: each injects its fault when it is entered and reverts it when it is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.environment import host, process_memory
from tests.faults.runs.experiment import Experiment
from tests.faults.runs.spec import HIGH_PRIORITY, KINDS
from tests.support.live.cluster import ROOT

UNSTABLE_NODE = "node-1"
"""The node that may lose its power; the control plane is reached through the other one."""
NODE_DOWN_FILE = ROOT / "build/NODE-DOWN"
"""Exists while the node is down, for other users of the cluster."""
PREEMPTING_POD = "rival"


@contextmanager
def kill_rank(experiment: Experiment) -> Iterator[None]:
    """Send SIGKILL to the rank in the second worker."""
    ranks = experiment.workers()[1].ranks
    experiment.mark_injection()
    host.kill(ranks)
    yield


@contextmanager
def kill_agent(experiment: Experiment) -> Iterator[None]:
    """Send SIGKILL to the second worker's PID 1, which is possible only from the host."""
    agent = experiment.workers()[1].agent
    experiment.mark_injection()
    host.kill([agent])
    yield


@contextmanager
def kill_container(experiment: Experiment) -> Iterator[None]:
    """Kill every process of the second worker's container at once, through containerd."""
    worker = experiment.workers()[1]
    experiment.mark_injection()
    host.call_containerd(worker.node, "tasks", "kill", "--all", "--signal", "SIGKILL", worker.container)
    yield


@contextmanager
def kill_kubelet(experiment: Experiment) -> Iterator[None]:
    """Kill the second worker with its kubelet, so that nothing reports its end."""
    worker = experiment.workers()[1]
    kubelet, pids = host.ClusterProcess(f"{worker.node}.kubelet"), host.list_pids(worker.container)
    experiment.mark_injection()
    kubelet.kill()
    host.kill(pids)
    try:
        yield
    finally:
        kubelet.start()


@contextmanager
def delete_pod(experiment: Experiment) -> Iterator[None]:
    """Delete the second worker's pod with kubectl."""
    name = experiment.workers()[1].name
    experiment.mark_injection()
    experiment.call("delete", "pod", name, "--wait=false")
    yield


@contextmanager
def evict_pod(experiment: Experiment) -> Iterator[None]:
    """Evict the second worker's pod through the eviction API, as `kubectl drain` and autoscalers do."""
    name = experiment.workers()[1].name
    metadata = {"name": name, "namespace": experiment.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{experiment.namespace}/pods/{name}/eviction"
    experiment.mark_injection()
    experiment.call("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    yield


@contextmanager
def preempt(experiment: Experiment) -> Iterator[None]:
    """Create a pod of higher priority that fits on the second worker's node only if the worker is preempted."""
    node = experiment.workers()[1].node
    pod = build_preempting_pod(experiment, node, millis=experiment.api.get_free_cpu_millis(node) + 100)
    experiment.mark_injection()
    experiment.call("create", "-f", "-", stdin=json.dumps(pod))
    try:
        yield
    finally:
        experiment.call("delete", "pod", PREEMPTING_POD, "--grace-period=1", "--timeout=60s")


def build_preempting_pod(experiment: Experiment, node: str, millis: int) -> dict[str, object]:
    """Return a pod of high priority that sleeps on a node until it is deleted."""
    container = {
        "name": "sleep",
        "image": experiment.image,
        "command": ["sleep", "3600"],
        "resources": {"requests": {"cpu": f"{millis}m"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "priorityClassName": HIGH_PRIORITY,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "containers": [container],
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    metadata = {"name": PREEMPTING_POD, "namespace": experiment.namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@contextmanager
def cut_power(experiment: Experiment) -> Iterator[None]:
    """Kill a node's kubelet, containerd and containers at once; it returns with nothing but its images."""
    assert UNSTABLE_NODE in [worker.node for worker in experiment.workers()]
    NODE_DOWN_FILE.write_text(f"{time.strftime('%H:%M:%S')} {experiment.run} {experiment.stage}\n")
    experiment.mark_injection()
    host.call_cluster_script("kill-node", UNSTABLE_NODE.removeprefix("node-"))
    try:
        yield
    finally:
        host.call_cluster_script("add-node", UNSTABLE_NODE.removeprefix("node-"))
        NODE_DOWN_FILE.unlink()


@contextmanager
def fill_disk(experiment: Experiment) -> Iterator[None]:
    """Fill the volume to the last byte, and free the space again."""
    experiment.mark_injection()
    experiment.disk.fill_up()
    try:
        yield
    finally:
        experiment.disk.free_space()


@contextmanager
def remove_volume(experiment: Experiment) -> Iterator[None]:
    """Take the volume away as if its server were gone, and bring it back."""
    experiment.mark_injection()
    experiment.disk.shut_down()
    try:
        yield
    finally:
        experiment.disk.mount_again()


@contextmanager
def run_out_of_memory(experiment: Experiment) -> Iterator[None]:
    """Let the kernel kill the second worker's rank at the container's memory limit."""
    worker = experiment.workers()[1]
    rank = worker.ranks[0]
    experiment.mark_injection()
    with process_memory.exhaust(worker.container, rank):
        yield


@contextmanager
def remove_image(experiment: Experiment) -> Iterator[None]:
    """Remove the image from registry and nodes, then kill the second worker's PID 1."""
    assert experiment.image_copy is not None
    agent = experiment.workers()[1].agent
    experiment.image_copy.remove()
    for node in {worker.node for worker in experiment.workers()}:
        host.remove_images(node, experiment.image_copy.image.repository)
    experiment.mark_injection()
    host.kill([agent])
    try:
        yield
    finally:
        experiment.image_copy.push()


@contextmanager
def write_nan_to_memory(experiment: Experiment) -> Iterator[None]:
    """Overwrite numbers in the memory of the second worker's rank with NaN, so that its loss is not finite."""
    rank = experiment.workers()[1].ranks[0]
    experiment.mark_injection()
    assert process_memory.write_nan(rank), "the parameters were not found in memory"
    yield


@contextmanager
def stop_rank(experiment: Experiment) -> Iterator[None]:
    """Send SIGSTOP to the rank in the second worker: it holds its connections but makes no progress."""
    rank = experiment.workers()[1].ranks[0]
    experiment.mark_injection()
    os.kill(rank, signal.SIGSTOP)
    yield


@contextmanager
def kill_operators(experiment: Experiment) -> Iterator[None]:
    """Kill the second worker's rank and every replica of the operator at once."""
    ranks = experiment.workers()[1].ranks
    operators = [
        pid
        for c in host.list_containers(experiment.api.list_pods_in(experiment.system_namespace))
        for pid in host.list_pids(c)
    ]
    assert operators
    experiment.mark_injection()
    host.kill(ranks + operators)
    yield


@contextmanager
def corrupt_input(experiment: Experiment) -> Iterator[None]:
    """Overwrite the second half of a file that the stage still has to read, and restore it afterwards."""
    path = find_input(experiment)
    content = path.read_bytes()
    experiment.mark_injection()
    overwrite(path, len(content) // 2, b"\xff" * (len(content) - len(content) // 2))
    try:
        yield
    finally:
        overwrite(path, 0, content)


def find_input(experiment: Experiment) -> Path:
    """Return a file that the active stage reads: the shard of its data, or its last benchmark."""
    match KINDS[experiment.stage]:
        case "pretrain":
            return experiment.output("curate") / "shards/00000.tar"
        case "sft":
            return experiment.volume.folder / "sft/shards/00000.tar"
    return experiment.volume.folder / "benchmarks/second.tsv"


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Write into a file in place, so that processes that have it open see the change."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@contextmanager
def truncate_images(experiment: Experiment) -> Iterator[None]:
    """Truncate the last 60 raw images to half their size; each has intact copies."""
    experiment.mark_injection()
    for path in sorted((experiment.volume.folder / "raw/posters").glob("poster-03[0-9]-1[0-5].png")):
        data = path.read_bytes()
        path.unlink()  # copies are hard links to the same file
        path.write_bytes(data[: len(data) // 2])
    yield
