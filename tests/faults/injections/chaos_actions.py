"""The faults of the chaos test: each is injected at any moment into whatever runs then, and says how to revert it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.environment import host
from tests.faults.injections.actions import PREEMPTING_POD, UNSTABLE_NODE, build_preempting_pod
from tests.faults.runs.experiment import Experiment

Revert = Callable[[], None]


class NoTargetError(Exception):
    """Nothing runs that the fault could be injected into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injected:
    """A fault that has been injected."""

    target: str
    """The pod, node or process."""
    revert: Revert | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosFault:
    """A kind of fault."""

    title: str
    inject: Callable[[Experiment, random.Random], Injected]
    """Raises NoTargetError, LookupError, StopIteration or OSError if there is no target."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """Bounds of the time until it is reverted."""
    exclusive_group: str = ""
    """At most one fault of a group is active at a time; empty for faults that may overlap with all."""


def _draw_worker(experiment: Experiment, rng: random.Random) -> host.WorkerContainer:
    if not experiment.recorder.workers:
        raise NoTargetError("no worker runs")
    return rng.choice(experiment.recorder.workers)


def _kubectl(experiment: Experiment, *arguments: str, stdin: str | None = None) -> None:
    """Run kubectl in the run's namespace; the API server may be down."""
    done = experiment.kubectl("-n", experiment.namespace, *arguments, stdin=stdin)
    if done.returncode:
        raise NoTargetError(done.stderr.strip()[-200:])


def kill_rank(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    if not (ranks := worker.ranks):
        raise NoTargetError(f"{worker.name} has no rank now")
    host.kill(ranks)
    return Injected(target=worker.name)


def kill_agent(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    host.kill([worker.agent])
    return Injected(target=worker.name)


def freeze_rank(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    for rank in worker.ranks:
        os.kill(rank, signal.SIGSTOP)
    return Injected(target=worker.name)


def delete_pod(experiment: Experiment, rng: random.Random) -> Injected:
    worker, grace = _draw_worker(experiment, rng), rng.choice(["0", "1", "30"])
    force = ["--force"] if grace == "0" else []
    _kubectl(experiment, "delete", "pod", worker.name, "--wait=false", f"--grace-period={grace}", *force)
    return Injected(target=f"{worker.name}, {grace} s of grace")


def evict_pod(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    metadata = {"name": worker.name, "namespace": experiment.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{experiment.namespace}/pods/{worker.name}/eviction"
    _kubectl(experiment, "create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    return Injected(target=worker.name)


def delete_job(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    job = worker.name.rsplit("-", 2)[0]
    _kubectl(experiment, "delete", "job", job, "--wait=false")
    return Injected(target=job)


def delete_service(experiment: Experiment, _: random.Random) -> Injected:
    _kubectl(experiment, "delete", "service", experiment.run, "--wait=false")
    return Injected(target=experiment.run)


def preempt(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    millis = experiment.api.get_free_cpu_millis(worker.node) + 100
    pod = build_preempting_pod(experiment, worker.node, millis=millis)
    _kubectl(experiment, "create", "-f", "-", stdin=json.dumps(pod))
    return Injected(
        target=worker.node, revert=lambda: _kubectl(experiment, "delete", "pod", PREEMPTING_POD, "--grace-period=1")
    )


def suspend(experiment: Experiment, _: random.Random) -> Injected:
    def set_suspend(value: bool) -> None:
        patch = json.dumps({"spec": {"suspend": value}})
        _kubectl(experiment, "patch", "svr", experiment.run, "--type=merge", "-p", patch)

    set_suspend(True)
    return Injected(target=experiment.run, revert=lambda: set_suspend(False))


def kill_operators(experiment: Experiment, rng: random.Random) -> Injected:
    replicas = [
        host.list_pids(c) for c in host.list_containers(experiment.api.list_pods_in(experiment.system_namespace))
    ]
    chosen = rng.choice([replicas, replicas[:1]]) if replicas else []
    if not chosen:
        raise NoTargetError("no operator runs")
    host.kill([pid for pids in chosen for pid in pids])
    return Injected(target=f"{len(chosen)} of {len(replicas)}")


def kill_kubelet(experiment: Experiment, rng: random.Random) -> Injected:
    worker = _draw_worker(experiment, rng)
    kubelet = host.ClusterProcess(f"{worker.node}.kubelet")
    kubelet.kill()
    with_worker = rng.random() < 0.5
    if with_worker:
        host.kill(host.list_pids(worker.container))
    return Injected(target=f"{worker.node}{' and ' + worker.name if with_worker else ''}", revert=kubelet.start)


def cut_power(_: Experiment, __: random.Random) -> Injected:
    number = UNSTABLE_NODE.removeprefix("node-")
    host.call_cluster_script("kill-node", number)
    return Injected(target=UNSTABLE_NODE, revert=lambda: host.call_cluster_script("add-node", number))


def kill_control_plane(name: str) -> Callable[[Experiment, random.Random], Injected]:
    """Return the injection that kills a process of the control plane."""

    def kill(_: Experiment, __: random.Random) -> Injected:
        process = host.ClusterProcess(name)
        process.kill()
        return Injected(target=name, revert=process.start)

    return kill


def fill_disk(experiment: Experiment, _: random.Random) -> Injected:
    experiment.disk.fill_up()
    return Injected(target=experiment.volume.name, revert=experiment.disk.free_space)


CHAOS_FAULTS: tuple[tuple[ChaosFault, int], ...] = (
    (ChaosFault(title="kill -9 of a rank", inject=kill_rank), 4),
    (ChaosFault(title="kill -9 of a worker's PID 1", inject=kill_agent), 3),
    (ChaosFault(title="SIGSTOP of a rank", inject=freeze_rank), 2),
    (ChaosFault(title="pod deleted", inject=delete_pod), 3),
    (ChaosFault(title="pod evicted", inject=evict_pod), 2),
    (ChaosFault(title="Job deleted", inject=delete_job), 2),
    (ChaosFault(title="Service deleted", inject=delete_service), 1),
    (ChaosFault(title="pod preempted", inject=preempt, seconds=(5, 30), exclusive_group="preemption"), 2),
    (ChaosFault(title="run suspended", inject=suspend, seconds=(0.1, 25), exclusive_group="suspend"), 2),
    (ChaosFault(title="operators killed", inject=kill_operators), 3),
    (ChaosFault(title="kubelet killed", inject=kill_kubelet, seconds=(3, 60), exclusive_group="node"), 2),
    (ChaosFault(title="power loss of a node", inject=cut_power, seconds=(5, 60), exclusive_group="node"), 2),
    (
        ChaosFault(
            title="API server killed",
            inject=kill_control_plane("apiserver"),
            seconds=(0.5, 12),
            exclusive_group="control plane",
        ),
        2,
    ),
    (
        ChaosFault(
            title="etcd killed", inject=kill_control_plane("etcd"), seconds=(0.5, 8), exclusive_group="control plane"
        ),
        1,
    ),
    (ChaosFault(title="disk full", inject=fill_disk, seconds=(1, 15), exclusive_group="disk"), 2),
)
"""Each fault with its weight."""
