"""What chaos does to a run: a strike hits whatever is there, at any moment, and says how it is taken back."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import host
from tests.faults.injections import LOST_NODE, build_rival
from tests.faults.scene import Scene

Undo = Callable[[], None]


class MissedError(Exception):
    """There was nothing to be hit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A strike that has been done."""

    what: str
    """Whom it hit."""
    undo: Undo | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Strike:
    words: str
    do: Callable[[Scene, random.Random], Hit]
    """Raises MissedError, LookupError, StopIteration or OSError where there is nothing to be hit."""
    lasts: tuple[float, float] = (0.0, 0.0)
    """Seconds until it is taken back, drawn from here to there."""
    alone: str = ""
    """Of the strikes with this word one is done at a time."""


def _pick(scene: Scene, chance: random.Random) -> host.Worker:
    if not scene.recorder.workers:
        raise MissedError("no worker runs")
    return chance.choice(scene.recorder.workers)


def _call(scene: Scene, *words: str, stdin: str | None = None) -> None:
    """kubectl in the run's namespace, as long as the API server is there."""
    done = scene.kubectl("-n", scene.namespace, *words, stdin=stdin)
    if done.returncode:
        raise MissedError(done.stderr.strip()[-200:])


def kill_rank(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    if not (ranks := worker.ranks):
        raise MissedError(f"{worker.name} has no rank now")
    host.kill(ranks)
    return Hit(what=worker.name)


def kill_agent(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    host.kill([worker.agent])
    return Hit(what=worker.name)


def freeze_rank(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    for rank in worker.ranks:
        os.kill(rank, signal.SIGSTOP)
    return Hit(what=worker.name)


def delete_pod(scene: Scene, chance: random.Random) -> Hit:
    worker, grace = _pick(scene, chance), chance.choice(["0", "1", "30"])
    force = ["--force"] if grace == "0" else []
    _call(scene, "delete", "pod", worker.name, "--wait=false", f"--grace-period={grace}", *force)
    return Hit(what=f"{worker.name}, {grace} s of grace")


def evict_pod(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    metadata = {"name": worker.name, "namespace": scene.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{scene.namespace}/pods/{worker.name}/eviction"
    _call(scene, "create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    return Hit(what=worker.name)


def delete_job(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    job = worker.name.rsplit("-", 2)[0]
    _call(scene, "delete", "job", job, "--wait=false")
    return Hit(what=job)


def delete_service(scene: Scene, _: random.Random) -> Hit:
    _call(scene, "delete", "service", scene.run, "--wait=false")
    return Hit(what=scene.run)


def preempt(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    pod = build_rival(scene, worker.node, millis=scene.api.free_millis(worker.node) + 100)
    _call(scene, "create", "-f", "-", stdin=json.dumps(pod))
    return Hit(what=worker.node, undo=lambda: _call(scene, "delete", "pod", "rival", "--grace-period=1"))


def suspend(scene: Scene, _: random.Random) -> Hit:
    def switch(value: bool) -> None:
        patch = json.dumps({"spec": {"suspend": value}})
        _call(scene, "patch", "svr", scene.run, "--type=merge", "-p", patch)

    switch(True)
    return Hit(what=scene.run, undo=lambda: switch(False))


def kill_operators(scene: Scene, chance: random.Random) -> Hit:
    replicas = [host.list_pids(c) for c in host.list_containers(scene.api.pods_of(scene.system))]
    hit = chance.choice([replicas, replicas[:1]]) if replicas else []
    if not hit:
        raise MissedError("no operator runs")
    host.kill([pid for pids in hit for pid in pids])
    return Hit(what=f"{len(hit)} of {len(replicas)}")


def kill_kubelet(scene: Scene, chance: random.Random) -> Hit:
    worker = _pick(scene, chance)
    kubelet = host.Part(f"{worker.node}.kubelet")
    kubelet.kill()
    with_worker = chance.random() < 0.5
    if with_worker:
        host.kill(host.list_pids(worker.container))
    return Hit(what=f"{worker.node}{' and ' + worker.name if with_worker else ''}", undo=kubelet.start)


def cut_power(_: Scene, __: random.Random) -> Hit:
    number = LOST_NODE.removeprefix("node-")
    host.call_script("kill-node", number)
    return Hit(what=LOST_NODE, undo=lambda: host.call_script("add-node", number))


def kill_part(name: str) -> Callable[[Scene, random.Random], Hit]:
    """Of the control plane."""

    def kill(_: Scene, __: random.Random) -> Hit:
        part = host.Part(name)
        part.kill()
        return Hit(what=name, undo=part.start)

    return kill


def fill_disk(scene: Scene, _: random.Random) -> Hit:
    scene.disk.fill_up()
    return Hit(what=scene.volume.name, undo=scene.disk.make_room)


STRIKES: tuple[tuple[Strike, int], ...] = (
    (Strike(words="kill -9 of a rank", do=kill_rank), 4),
    (Strike(words="kill -9 of PID 1", do=kill_agent), 3),
    (Strike(words="SIGSTOP of a rank", do=freeze_rank), 2),
    (Strike(words="a pod deleted", do=delete_pod), 3),
    (Strike(words="a pod evicted", do=evict_pod), 2),
    (Strike(words="the Job deleted", do=delete_job), 2),
    (Strike(words="the Service deleted", do=delete_service), 1),
    (Strike(words="a pod preempted", do=preempt, lasts=(5, 30), alone="rival"), 2),
    (Strike(words="suspended", do=suspend, lasts=(0.1, 25), alone="suspend"), 2),
    (Strike(words="operators killed", do=kill_operators), 3),
    (Strike(words="a kubelet killed", do=kill_kubelet, lasts=(3, 60), alone="node"), 2),
    (Strike(words="power of a node cut", do=cut_power, lasts=(5, 60), alone="node"), 2),
    (Strike(words="the API server killed", do=kill_part("apiserver"), lasts=(0.5, 12), alone="control plane"), 2),
    (Strike(words="etcd killed", do=kill_part("etcd"), lasts=(0.5, 8), alone="control plane"), 1),
    (Strike(words="the disk full", do=fill_disk, lasts=(1, 15), alone="disk"), 2),
)
"""And how often."""
