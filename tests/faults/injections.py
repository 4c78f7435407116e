"""What is done to a run, for real: each function does its harm when it is entered and takes it back when it is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults import host, memory
from tests.faults.recipe import HIGH_PRIORITY, KINDS
from tests.faults.scene import Scene
from tests.support.live.cluster import ROOT

LOST_NODE = "node-1"
"""The one that may lose its power: the other holds what the control plane is reached by."""
NOTE = ROOT / "build/NODE-DOWN"
"""There while the node is not: others may use the cluster, too."""


@contextmanager
def kill_rank(scene: Scene) -> Iterator[None]:
    """kill -9 of the rank in the second worker."""
    ranks = scene.workers()[1].ranks
    scene.strike()
    host.kill(ranks)
    yield


@contextmanager
def kill_agent(scene: Scene) -> Iterator[None]:
    """kill -9 of the second worker's PID 1, which only the machine below can do."""
    agent = scene.workers()[1].agent
    scene.strike()
    host.kill([agent])
    yield


@contextmanager
def kill_container(scene: Scene) -> Iterator[None]:
    """Every process of the second worker's container at once, by its containerd."""
    worker = scene.workers()[1]
    scene.strike()
    host.call_containerd(worker.node, "tasks", "kill", "--all", "--signal", "SIGKILL", worker.container)
    yield


@contextmanager
def kill_kubelet(scene: Scene) -> Iterator[None]:
    """The second worker's kubelet and the worker with it: nobody is left to tell of it."""
    worker = scene.workers()[1]
    kubelet, pids = host.Part(f"{worker.node}.kubelet"), host.list_pids(worker.container)
    scene.strike()
    kubelet.kill()
    host.kill(pids)
    try:
        yield
    finally:
        kubelet.start()


@contextmanager
def delete_pod(scene: Scene) -> Iterator[None]:
    """`kubectl delete pod`."""
    name = scene.workers()[1].name
    scene.strike()
    scene.call("delete", "pod", name, "--wait=false")
    yield


@contextmanager
def evict_pod(scene: Scene) -> Iterator[None]:
    """By the eviction API, as `kubectl drain` and autoscalers do."""
    name = scene.workers()[1].name
    metadata = {"name": name, "namespace": scene.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{scene.namespace}/pods/{name}/eviction"
    scene.strike()
    scene.call("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    yield


@contextmanager
def preempt(scene: Scene) -> Iterator[None]:
    """A pod of higher priority that fits on the second worker's node only in its place."""
    node = scene.workers()[1].node
    pod = build_rival(scene, node, millis=scene.api.free_millis(node) + 100)
    scene.strike()
    scene.call("create", "-f", "-", stdin=json.dumps(pod))
    try:
        yield
    finally:
        scene.call("delete", "pod", "rival", "--grace-period=1", "--timeout=60s")


def build_rival(scene: Scene, node: str, millis: int) -> dict[str, object]:
    """It sleeps on a node until it is deleted."""
    container = {
        "name": "sleep",
        "image": scene.image,
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
    metadata = {"name": "rival", "namespace": scene.namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@contextmanager
def cut_power(scene: Scene) -> Iterator[None]:
    """The node's kubelet, its containerd and every container of it at once; it comes back empty but for its images."""
    assert LOST_NODE in [worker.node for worker in scene.workers()]
    NOTE.write_text(f"{time.strftime('%H:%M:%S')} {scene.run} {scene.stage}\n")
    scene.strike()
    host.call_script("kill-node", LOST_NODE.removeprefix("node-"))
    try:
        yield
    finally:
        host.call_script("add-node", LOST_NODE.removeprefix("node-"))
        NOTE.unlink()


@contextmanager
def fill_disk(scene: Scene) -> Iterator[None]:
    """The volume is full to the last byte until there is room again."""
    scene.strike()
    scene.disk.fill_up()
    try:
        yield
    finally:
        scene.disk.make_room()


@contextmanager
def take_volume(scene: Scene) -> Iterator[None]:
    """The volume's server is gone until it is back."""
    scene.strike()
    scene.disk.take_away()
    try:
        yield
    finally:
        scene.disk.bring_back()


@contextmanager
def run_out_of_memory(scene: Scene) -> Iterator[None]:
    """The kernel kills the second worker's rank at the container's memory limit."""
    worker = scene.workers()[1]
    rank = worker.ranks[0]
    scene.strike()
    with memory.squeezed(worker.container, rank):
        yield


@contextmanager
def take_image(scene: Scene) -> Iterator[None]:
    """The image goes from the registry and from the nodes; then the second worker's PID 1 is killed."""
    assert scene.copy is not None
    agent = scene.workers()[1].agent
    scene.copy.remove()
    for node in {worker.node for worker in scene.workers()}:
        host.forget_images(node, scene.copy.image.repository)
    scene.strike()
    host.kill([agent])
    try:
        yield
    finally:
        scene.copy.put()


@contextmanager
def spoil_memory(scene: Scene) -> Iterator[None]:
    """Numbers that are none in the memory of the second worker's rank, from which its loss comes."""
    rank = scene.workers()[1].ranks[0]
    scene.strike()
    assert memory.spoil(rank), "the numbers were found"
    yield


@contextmanager
def freeze(scene: Scene) -> Iterator[None]:
    """SIGSTOP of the rank in the second worker: it holds its connections and says nothing."""
    rank = scene.workers()[1].ranks[0]
    scene.strike()
    os.kill(rank, signal.SIGSTOP)
    yield


@contextmanager
def kill_operators(scene: Scene) -> Iterator[None]:
    """kill -9 of the second worker's rank and of every replica of the operator at once."""
    ranks = scene.workers()[1].ranks
    operators = [pid for c in host.list_containers(scene.api.pods_of(scene.system)) for pid in host.list_pids(c)]
    assert operators
    scene.strike()
    host.kill(ranks + operators)
    yield


@contextmanager
def garble(scene: Scene) -> Iterator[None]:
    """The second half of a file that the stage still has to read, overwritten where it lies until a person mends it."""
    path = find_input(scene)
    sound = path.read_bytes()
    scene.strike()
    overwrite(path, len(sound) // 2, b"\xff" * (len(sound) - len(sound) // 2))
    try:
        yield
    finally:
        overwrite(path, 0, sound)


def find_input(scene: Scene) -> Path:
    """What the active stage reads: the shard of its data, or its last benchmark."""
    match KINDS[scene.stage]:
        case "pretrain":
            return scene.output("curate") / "shards/00000.tar"
        case "sft":
            return scene.volume.folder / "sft/shards/00000.tar"
    return scene.volume.folder / "benchmarks/second.tsv"


def overwrite(path: Path, at: int, data: bytes) -> None:
    """In place: whoever has it open sees it."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@contextmanager
def cut_pictures(scene: Scene) -> Iterator[None]:
    """Half of each of 60 raw pictures that come last is gone; each has copies that are whole."""
    scene.strike()
    for path in sorted((scene.volume.folder / "raw/posters").glob("poster-03[0-9]-1[0-5].png")):
        data = path.read_bytes()
        path.unlink()  # the copies are links to the same file
        path.write_bytes(data[: len(data) // 2])
    yield
