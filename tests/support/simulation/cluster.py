"""The cluster around the operator: Job controller, garbage collector, Kueue, scheduler, nodes and their kubelets.

Each reacts to writes to the in-memory API server after a short, drawn delay. `workers.py` has the processes in pods.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sailvl_operator.api import names
from tests.support.apiserver.objects import Object, get_owner_uid, is_active
from tests.support.apiserver.store import ObjectStore, ObjectWrite
from tests.support.simulation.workers import SimulatedWorkers

NAMESPACE = "team"
_JOBS = "job-controller"
_PODS_PER_NODE = 3
_NOT_READY_AFTER_SECONDS, _EVICTED_AFTER_SECONDS = 14.0, 35.0
"""Time from a node's failure until its pods are marked as not ready, and until they are evicted."""


@dataclass(kw_only=True)
class SimulatedNode:
    """A node with its kubelet."""

    name: str
    unreachable_since: float | None = None
    deferred: list[Callable[[], None]] = field(default_factory=list)
    """Actions and reports of its kubelet that wait until it can reach the API server again."""


class SimulatedCluster:
    """Everything but the operator, its users and the network between them."""

    def __init__(self, api: ObjectStore, rng: random.Random, *, nodes: int = 4) -> None:
        self.api, self.rng = api, rng
        self.nodes = {name: SimulatedNode(name=name) for name in (f"node-{i}" for i in range(nodes))}
        self.is_full = self.is_image_missing = False
        self.workers = SimulatedWorkers(self)
        self._finished_indexes: dict[str, set[int]] = {}
        """Completion indexes that have ended and get no second pod, by the Job's uid."""
        self._ips = 0
        api.observers.append(self._on_write)

    def call_later(self, earliest: float, latest: float, act: Callable[..., None], *args: Any) -> None:
        """Call a function after a drawn delay, in seconds."""
        asyncio.get_running_loop().call_later(self.rng.uniform(earliest, latest), act, *args)

    def list_pods(self, job_uid: str) -> list[Object]:
        """Return the pods of a Job."""
        return [p for p in self.api.list_objects("pods") if get_owner_uid(p) == job_uid]

    def _on_write(self, write: ObjectWrite) -> None:
        """Schedule what the controllers do after their watches have delivered a write."""
        uid = write.object["metadata"]["uid"]
        if write.verb == "remove":
            self.call_later(0.1, 4.0, self._collect_dependents, uid)
        if write.verb == "create" and get_owner_uid(write.object):
            self.call_later(0.5, 4.0, self._collect_if_orphan, write.plural, uid)
        if write.plural == "jobs":
            self.call_later(0.01, 0.5, self._sync_job, uid)
            if self.is_queued(write.object) and write.object["spec"]["suspend"]:
                self.call_later(0.5, 60.0, self._admit_job, uid)
        elif write.plural == "pods":
            self._on_pod_write(write, uid)

    def _on_pod_write(self, write: ObjectWrite, uid: str) -> None:
        pod, job = write.object, get_owner_uid(write.object)
        if write.verb == "create":
            self.call_later(0.05, 1.0, self._schedule, uid)
        elif write.verb == "delete":
            self.call_later(0.05, 0.5, self._stop, uid)
        if write.verb == "remove" and pod["spec"].get("nodeName") and is_active(pod):
            self._mark_finished(job, pod)
        if not is_active(pod):
            self._mark_finished(job, pod)
        self.call_later(0.01, 0.5, self._sync_job, job)

    def _mark_finished(self, job_uid: str, pod: Object) -> None:
        job = self.api.find("jobs", job_uid)
        has_succeeded = pod["status"]["phase"] == "Succeeded"
        if job is not None and (has_succeeded or not job["spec"].get("suspend")):
            self._finished_indexes.setdefault(job_uid, set()).add(get_completion_index(pod))

    def remove_if_present(self, plural: str, uid: str) -> None:
        """Remove an object that another client created, unless it is gone already."""
        found = self.api.find(plural, uid)
        if found is not None:
            self.api.remove(plural, found, by="another client")

    # The garbage collector.

    def _collect_dependents(self, uid: str) -> None:
        for plural in ("jobs", "pods", "services", "networkpolicies", "persistentvolumeclaims"):
            for found in [o for o in self.api.list_objects(plural) if get_owner_uid(o) == uid]:
                self.api.delete(plural, found, by="garbage-collector")

    def delete_in_foreground(self, run: Object) -> None:
        """Mark the run as deleted; it is removed after its dependents, as with propagationPolicy Foreground."""
        mark = {"deletionTimestamp": self.api.format_time(), "finalizers": ["foregroundDeletion"]}
        run = self.api.update("sailvlruns", run, lambda new: new["metadata"].update(mark), by="a user")
        self.call_later(0.1, 2.0, self._remove_after_dependents, run["metadata"]["uid"])

    def _remove_after_dependents(self, uid: str) -> None:
        run = self.api.find("sailvlruns", uid)
        if run is None:
            return
        self._collect_dependents(uid)
        jobs = {j["metadata"]["uid"] for j in self.api.list_objects("jobs")}
        if any(get_owner_uid(o) in {uid, *jobs} for plural in ("jobs", "pods") for o in self.api.list_objects(plural)):
            self.call_later(0.5, 3.0, self._remove_after_dependents, uid)
        else:
            self.api.remove("sailvlruns", run, by="garbage-collector")

    def _collect_if_orphan(self, plural: str, uid: str) -> None:
        found = self.api.find(plural, uid)
        owner = "" if found is None else get_owner_uid(found)
        if found is not None and not any(self.api.find(p, owner) for p in ("sailvlruns", "jobs")):
            self.api.delete(plural, found, by="garbage-collector")

    # The Job controller.

    def _sync_job(self, uid: str) -> None:
        """Create missing pods of an Indexed Job with backoffLimitPerIndex 0 and podReplacementPolicy Failed.

        A suspended Job's pods are deleted with their grace period.
        """
        job = self.api.find("jobs", uid)
        if job is None:
            return
        pods = self.list_pods(uid)
        if job["spec"].get("suspend"):
            job = self.api.update("jobs", job, lambda new: new.update(status={}), by=_JOBS)
            for pod in pods:
                if is_active(pod) and "deletionTimestamp" not in pod["metadata"]:
                    self.api.delete("pods", pod, by=_JOBS)
            return
        if "startTime" not in job.get("status", {}):
            job = self.api.update(
                "jobs", job, lambda new: new.update(status={"startTime": self.api.format_time()}), by=_JOBS
            )
        used = {get_completion_index(p) for p in pods} | self._finished_indexes.get(uid, set())
        for index in sorted(set(range(job["spec"]["completions"])) - used):
            self._create_pod(job, index)

    def _create_pod(self, job: Object, index: int) -> None:
        template, metadata = job["spec"]["template"], job["metadata"]
        labels = template["metadata"]["labels"] | {
            names.LABEL_JOB_NAME: metadata["name"],
            names.LABEL_COMPLETION_INDEX: str(index),
        }
        owner = {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
        body = {
            "metadata": {
                "generateName": f"{metadata['name']}-{index}-",
                "namespace": metadata["namespace"],
                "labels": labels,
                "ownerReferences": [owner],
            },
            "spec": {"terminationGracePeriodSeconds": template["spec"]["terminationGracePeriodSeconds"]},
            "status": {"phase": "Pending"},
        }
        self.api.create("pods", body, by=_JOBS)

    # Kueue.

    def is_queued(self, job: Object) -> bool:
        """Return whether Kueue manages a Job that has not finished."""
        spent = self._finished_indexes.get(job["metadata"]["uid"], set())
        return names.LABEL_KUEUE_QUEUE in job["metadata"]["labels"] and len(spent) < job["spec"]["completions"]

    def _admit_job(self, uid: str) -> None:
        job = self.api.find("jobs", uid)
        if job is None or not self.is_queued(job):
            return
        if not self.is_full:
            self.api.update("jobs", job, lambda new: new["spec"].update(suspend=False), by="kueue")
        else:
            self.call_later(5.0, 30.0, self._admit_job, uid)

    # The scheduler.

    def _schedule(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or pod["spec"].get("nodeName"):
            return
        fitting = [] if self.is_full else [n for n in self.nodes.values() if self._fits(n, pod)]
        if not fitting:
            condition = {"status": "False", "reason": "Unschedulable", "message": "0/4 nodes are available"}
            self._set_condition(pod, "PodScheduled", condition, by="scheduler")
            self.call_later(3.0, 10.0, self._schedule, uid)
            return
        node = self.rng.choice(fitting).name
        pod = self.api.update("pods", pod, lambda new: new["spec"].update(nodeName=node), by="scheduler")
        self._set_condition(pod, "PodScheduled", {"status": "True"}, by="scheduler")
        self.call_later(0.1, 3.0, self._start, uid)

    def _fits(self, node: SimulatedNode, pod: Object) -> bool:
        here = [p for p in self.api.list_objects("pods") if p["spec"].get("nodeName") == node.name and is_active(p)]
        return (
            node.unreachable_since is None
            and len(here) < _PODS_PER_NODE
            and node.name not in self._list_excluded_nodes(pod)
        )

    def _list_excluded_nodes(self, pod: Object) -> set[str]:
        job = self.api.find("jobs", get_owner_uid(pod))
        affinity = {} if job is None else job["spec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
        return {value for term in terms for field_ in term["matchFields"] for value in field_["values"]}

    # Nodes and their kubelets.

    def disconnect(self, node: SimulatedNode) -> None:
        """Cut a node off, as if it lost its power or its network; its processes can't reach their peers."""
        since = node.unreachable_since = self.api.clock()
        for pod in self._list_pods_on(node):
            self.workers.lose(pod)
        self.call_later(_NOT_READY_AFTER_SECONDS, _NOT_READY_AFTER_SECONDS + 2, self._mark_not_ready, node, since)
        self.call_later(_EVICTED_AFTER_SECONDS, _EVICTED_AFTER_SECONDS + 5, self._evict_from, node, since)

    def reconnect(self, node: SimulatedNode) -> None:
        """Let a node's kubelet reach the API server again and report what happened meanwhile."""
        if node.unreachable_since is None:
            return
        node.unreachable_since = None
        deferred, node.deferred = node.deferred, []
        for act in deferred:
            self.call_later(0.1, 3.0, act)
        for pod in self._list_pods_on(node):
            if pod["status"]["phase"] == "Running":
                self._set_condition(pod, "Ready", {"status": "True"}, by="kubelet")

    def remove_node(self, node: SimulatedNode) -> None:
        """Replace a node by an empty one; the pod garbage collector ends its pods without their kubelet."""
        condition = {"status": "True", "reason": "DeletionByPodGC", "message": "node not found"}
        for pod in self._list_pods_on(node):
            self.workers.lose(pod)
            last = self._set_condition(pod, "DisruptionTarget", condition, by="pod-gc")
            if is_active(last):
                last = self.api.update("pods", last, lambda new: new["status"].update(phase="Failed"), by="pod-gc")
            self.api.remove("pods", last, by="pod-gc")
        node.unreachable_since, node.deferred = None, []

    def evict(self, pod: Object, reason: str) -> None:
        """Evict a pod as the eviction API, a preempting scheduler or the taint manager does."""
        condition = {"status": "True", "reason": reason, "message": "evicted"}
        pod = self._set_condition(pod, "DisruptionTarget", condition, by="eviction")
        self.api.delete("pods", pod, by="eviction")

    def when_reachable(self, pod: Object, act: Callable[[], None]) -> None:
        """Call a function now, or once the pod's node is connected again."""
        node = self.nodes[pod["spec"]["nodeName"]]
        if node.unreachable_since is None:
            act()
        else:
            node.deferred.append(act)

    def _list_pods_on(self, node: SimulatedNode) -> list[Object]:
        return [p for p in self.api.list_objects("pods") if p["spec"].get("nodeName") == node.name]

    def _mark_not_ready(self, node: SimulatedNode, since: float) -> None:
        for pod in self._list_pods_on(node) if node.unreachable_since == since else []:
            if pod["status"]["phase"] == "Running":
                self._set_condition(pod, "Ready", {"status": "False"}, by="node-controller")

    def _evict_from(self, node: SimulatedNode, since: float) -> None:
        for pod in self._list_pods_on(node) if node.unreachable_since == since else []:
            if is_active(pod):
                self.evict(pod, "DeletionByTaintManager")

    def _start(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Pending" or "deletionTimestamp" in pod["metadata"]:
            return
        self.when_reachable(pod, lambda: self._pull_and_run(uid))

    def _pull_and_run(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return
        if self.is_image_missing:
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
            self.set_container(pod, waiting, phase="Pending")
            self.call_later(5.0, 15.0, self._start, uid)
            return
        self._ips += 1
        ip = f"10.0.{self._ips // 250}.{self._ips % 250 + 1}"
        pod = self.set_container(pod, {"running": {"startedAt": self.api.format_time()}}, phase="Running", podIP=ip)
        pod = self._set_condition(pod, "Ready", {"status": "True"}, by="kubelet")
        self.workers.begin(pod)

    def _stop(self, uid: str) -> None:
        """Send SIGTERM to a deleted pod's container."""
        pod = self.api.find("pods", uid)
        if pod is not None:
            self.when_reachable(pod, lambda: self.workers.terminate(uid))

    def remove_ended_pod(self, uid: str) -> None:
        """Remove a deleted pod whose container has ended, as its kubelet does."""
        pod = self.api.find("pods", uid)
        if pod is not None and "deletionTimestamp" in pod["metadata"]:
            self.api.remove("pods", pod, by="kubelet")

    def set_container(self, pod: Object, state: Object, *, phase: str, **status: Any) -> Object:
        """Set the state of a pod's worker container, the pod's phase and other fields of its status."""

        def mutate(new: Object) -> None:
            container = {"name": names.CONTAINER, "state": state}
            new["status"] |= {"phase": phase, "containerStatuses": [container], **status}

        return self.api.update("pods", pod, mutate, by="kubelet")

    def _set_condition(self, pod: Object, type_: str, condition: dict[str, str], *, by: str) -> Object:
        def mutate(new: Object) -> None:
            conditions = {c["type"]: c for c in new["status"].get("conditions", [])}
            known = conditions.get(type_, {})
            stamp = (
                known.get("lastTransitionTime", "")
                if known.get("status") == condition["status"]
                else self.api.format_time()
            )
            conditions[type_] = {"type": type_, "lastTransitionTime": stamp} | condition
            new["status"]["conditions"] = list(conditions.values())

        return self.api.update("pods", pod, mutate, by=by)


def get_completion_index(pod: Object) -> int:
    """Return the completion index of a Job's pod."""
    return int(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX])
