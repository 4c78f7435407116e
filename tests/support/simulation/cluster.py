"""A model of the cluster around the operator: Job controller, garbage collector, scheduler, nodes and their kubelets.

Each acts on what the API server (`model_api.py`) holds, a little later; `model_workers.py` says what becomes of the
workers' processes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sailvl_operator.api import names
from tests.support.simulation.api import ModelApi, Object, Write, may_run, owner_of
from tests.support.simulation.workers import Workers

NAMESPACE = "team"
_JOBS = "job-controller"
_ROOM = 3
"""Pods a node has room for."""
_READY_LOST_AFTER, _EVICTED_AFTER = 14.0, 35.0
"""Seconds from a node's silence until its pods count as not ready, and until they are evicted."""


@dataclass(kw_only=True)
class Node:
    name: str
    silent_since: float | None = None
    deferred: list[Callable[[], None]] = field(default_factory=list)
    """What its kubelet will do and tell when it is heard again."""


class Cluster:
    """Everything that isn't the operator, a user, or the network between them."""

    def __init__(self, api: ModelApi, rng: random.Random, *, nodes: int = 4) -> None:
        self.api, self.rng = api, rng
        self.nodes = {name: Node(name=name) for name in (f"node-{i}" for i in range(nodes))}
        self.is_full = self.is_image_gone = False
        self.workers = Workers(self)
        self._spent: dict[str, set[int]] = {}
        """Indexes of a Job, by its uid, that ended and get no second pod."""
        self._ips = 0
        api.observers.append(self._see)

    def later(self, earliest: float, latest: float, act: Callable[..., None], *args: Any) -> None:
        """Do something after a while, drawn."""
        asyncio.get_running_loop().call_later(self.rng.uniform(earliest, latest), act, *args)

    def pods_of(self, job_uid: str) -> list[Object]:
        return [p for p in self.api.all("pods") if owner_of(p) == job_uid]

    def _see(self, write: Write) -> None:
        """What each controller's own watch tells it."""
        uid = write.object["metadata"]["uid"]
        if write.verb == "remove":
            self.later(0.1, 4.0, self._collect_dependents, uid)
        if write.verb == "create" and owner_of(write.object):
            self.later(0.5, 4.0, self._collect_orphan, write.plural, uid)
        if write.plural == "jobs":
            self.later(0.01, 0.5, self._sync_job, uid)
            if self.is_queued(write.object) and write.object["spec"]["suspend"]:
                self.later(0.5, 60.0, self._admit, uid)
        elif write.plural == "pods":
            self._see_pod(write, uid)

    def _see_pod(self, write: Write, uid: str) -> None:
        pod, job = write.object, owner_of(write.object)
        if write.verb == "create":
            self.later(0.05, 1.0, self._place, uid)
        elif write.verb == "delete":
            self.later(0.05, 0.5, self._stop, uid)
        if write.verb == "remove" and pod["spec"].get("nodeName") and may_run(pod):
            self._spend(job, pod)
        if not may_run(pod):
            self._spend(job, pod)
        self.later(0.01, 0.5, self._sync_job, job)

    def _spend(self, job_uid: str, pod: Object) -> None:
        job = self.api.find("jobs", job_uid)
        has_succeeded = pod["status"]["phase"] == "Succeeded"
        if job is not None and (has_succeeded or not job["spec"].get("suspend")):
            self._spent.setdefault(job_uid, set()).add(index_of(pod))

    def remove_if_there(self, plural: str, uid: str) -> None:
        """By whoever made it."""
        found = self.api.find(plural, uid)
        if found is not None:
            self.api.remove(plural, found, by="a stranger")

    # The garbage collector.

    def _collect_dependents(self, uid: str) -> None:
        for plural in ("jobs", "pods", "services", "persistentvolumeclaims"):
            for found in [o for o in self.api.all(plural) if owner_of(o) == uid]:
                self.api.delete(plural, found, by="garbage-collector")

    def delete_in_the_foreground(self, run: Object) -> None:
        """The run stays, marked as deleted, until its children are gone."""
        mark = {"deletionTimestamp": self.api.stamp(), "finalizers": ["foregroundDeletion"]}
        run = self.api.change("sailvlruns", run, lambda new: new["metadata"].update(mark), by="a person")
        self.later(0.1, 2.0, self._collect_then_remove, run["metadata"]["uid"])

    def _collect_then_remove(self, uid: str) -> None:
        run = self.api.find("sailvlruns", uid)
        if run is None:
            return
        self._collect_dependents(uid)
        jobs = {j["metadata"]["uid"] for j in self.api.all("jobs")}
        if any(owner_of(o) in {uid, *jobs} for plural in ("jobs", "pods") for o in self.api.all(plural)):
            self.later(0.5, 3.0, self._collect_then_remove, uid)
        else:
            self.api.remove("sailvlruns", run, by="garbage-collector")

    def _collect_orphan(self, plural: str, uid: str) -> None:
        found = self.api.find(plural, uid)
        owner = "" if found is None else owner_of(found)
        if found is not None and not any(self.api.find(p, owner) for p in ("sailvlruns", "jobs")):
            self.api.delete(plural, found, by="garbage-collector")

    # The Job controller.

    def _sync_job(self, uid: str) -> None:
        """Indexed, backoffLimitPerIndex 0, podReplacementPolicy Failed; suspend deletes the pods with their grace."""
        job = self.api.find("jobs", uid)
        if job is None:
            return
        pods = self.pods_of(uid)
        if job["spec"].get("suspend"):
            job = self.api.change("jobs", job, lambda new: new.update(status={}), by=_JOBS)
            for pod in pods:
                if may_run(pod) and "deletionTimestamp" not in pod["metadata"]:
                    self.api.delete("pods", pod, by=_JOBS)
            return
        if "startTime" not in job.get("status", {}):
            job = self.api.change("jobs", job, lambda new: new.update(status={"startTime": self.api.stamp()}), by=_JOBS)
        taken = {index_of(p) for p in pods} | self._spent.get(uid, set())
        for index in sorted(set(range(job["spec"]["completions"])) - taken):
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
        """Kueue's, and not over."""
        spent = self._spent.get(job["metadata"]["uid"], set())
        return names.LABEL_KUEUE_QUEUE in job["metadata"]["labels"] and len(spent) < job["spec"]["completions"]

    def _admit(self, uid: str) -> None:
        job = self.api.find("jobs", uid)
        if job is None or not self.is_queued(job):
            return
        if not self.is_full:
            self.api.change("jobs", job, lambda new: new["spec"].update(suspend=False), by="kueue")
        else:
            self.later(5.0, 30.0, self._admit, uid)

    # The scheduler.

    def _place(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or pod["spec"].get("nodeName"):
            return
        fitting = [] if self.is_full else [n for n in self.nodes.values() if self._fits(n, pod)]
        if not fitting:
            words = {"status": "False", "reason": "Unschedulable", "message": "0/4 nodes are available"}
            self._set_condition(pod, "PodScheduled", words, by="scheduler")
            self.later(3.0, 10.0, self._place, uid)
            return
        node = self.rng.choice(fitting).name
        pod = self.api.change("pods", pod, lambda new: new["spec"].update(nodeName=node), by="scheduler")
        self._set_condition(pod, "PodScheduled", {"status": "True"}, by="scheduler")
        self.later(0.1, 3.0, self._start, uid)

    def _fits(self, node: Node, pod: Object) -> bool:
        here = [p for p in self.api.all("pods") if p["spec"].get("nodeName") == node.name and may_run(p)]
        return node.silent_since is None and len(here) < _ROOM and node.name not in self._avoided(pod)

    def _avoided(self, pod: Object) -> set[str]:
        job = self.api.find("jobs", owner_of(pod))
        affinity = {} if job is None else job["spec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
        return {value for term in terms for field_ in term["matchFields"] for value in field_["values"]}

    # Nodes and their kubelets.

    def silence(self, node: Node) -> None:
        """The node loses power or its network; its processes can't reach their peers."""
        since = node.silent_since = self.api.clock()
        for pod in self._on(node):
            self.workers.lose(pod)
        self.later(_READY_LOST_AFTER, _READY_LOST_AFTER + 2, self._mark_not_ready, node, since)
        self.later(_EVICTED_AFTER, _EVICTED_AFTER + 5, self._evict_from, node, since)

    def bring_back(self, node: Node) -> None:
        """Its kubelet is heard again, and says what happened meanwhile."""
        if node.silent_since is None:
            return
        node.silent_since = None
        deferred, node.deferred = node.deferred, []
        for act in deferred:
            self.later(0.1, 3.0, act)
        for pod in self._on(node):
            if pod["status"]["phase"] == "Running":
                self._set_condition(pod, "Ready", {"status": "True"}, by="kubelet")

    def remove(self, node: Node) -> None:
        """From the cluster: its pods are ended by the garbage collector of pods, without their kubelet."""
        words = {"status": "True", "reason": "DeletionByPodGC", "message": "node not found"}
        for pod in self._on(node):
            self.workers.lose(pod)
            last = self._set_condition(pod, "DisruptionTarget", words, by="pod-gc")
            if may_run(last):
                last = self.api.change("pods", last, lambda new: new["status"].update(phase="Failed"), by="pod-gc")
            self.api.remove("pods", last, by="pod-gc")
        node.silent_since, node.deferred = None, []

    def evict(self, pod: Object, reason: str) -> None:
        """By the eviction API, a preempting scheduler or the taint manager."""
        words = {"status": "True", "reason": reason, "message": "evicted"}
        pod = self._set_condition(pod, "DisruptionTarget", words, by="eviction")
        self.api.delete("pods", pod, by="eviction")

    def when_heard(self, pod: Object, act: Callable[[], None]) -> None:
        """Do it now, or when the pod's node is heard again."""
        node = self.nodes[pod["spec"]["nodeName"]]
        if node.silent_since is None:
            act()
        else:
            node.deferred.append(act)

    def _on(self, node: Node) -> list[Object]:
        return [p for p in self.api.all("pods") if p["spec"].get("nodeName") == node.name]

    def _mark_not_ready(self, node: Node, since: float) -> None:
        for pod in self._on(node) if node.silent_since == since else []:
            if pod["status"]["phase"] == "Running":
                self._set_condition(pod, "Ready", {"status": "False"}, by="node-controller")

    def _evict_from(self, node: Node, since: float) -> None:
        for pod in self._on(node) if node.silent_since == since else []:
            if may_run(pod):
                self.evict(pod, "DeletionByTaintManager")

    def _start(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or pod["status"]["phase"] != "Pending" or "deletionTimestamp" in pod["metadata"]:
            return
        self.when_heard(pod, lambda: self._pull_and_run(uid))

    def _pull_and_run(self, uid: str) -> None:
        pod = self.api.find("pods", uid)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return
        if self.is_image_gone:
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
            self.set_container(pod, waiting, phase="Pending")
            self.later(5.0, 15.0, self._start, uid)
            return
        self._ips += 1
        ip = f"10.0.{self._ips // 250}.{self._ips % 250 + 1}"
        pod = self.set_container(pod, {"running": {"startedAt": self.api.stamp()}}, phase="Running", podIP=ip)
        pod = self._set_condition(pod, "Ready", {"status": "True"}, by="kubelet")
        self.workers.begin(pod)

    def _stop(self, uid: str) -> None:
        """SIGTERM, the grace, SIGKILL."""
        pod = self.api.find("pods", uid)
        if pod is not None:
            self.when_heard(pod, lambda: self.workers.terminate(uid))

    def clear(self, uid: str) -> None:
        """The kubelet's last word on a deleted pod."""
        pod = self.api.find("pods", uid)
        if pod is not None and "deletionTimestamp" in pod["metadata"]:
            self.api.remove("pods", pod, by="kubelet")

    def set_container(self, pod: Object, state: Object, *, phase: str, **status: Any) -> Object:
        """Of the worker; with the pod's phase."""

        def mutate(new: Object) -> None:
            container = {"name": names.CONTAINER, "state": state}
            new["status"] |= {"phase": phase, "containerStatuses": [container], **status}

        return self.api.change("pods", pod, mutate, by="kubelet")

    def _set_condition(self, pod: Object, type_: str, words: dict[str, str], *, by: str) -> Object:
        def mutate(new: Object) -> None:
            conditions = {c["type"]: c for c in new["status"].get("conditions", [])}
            known = conditions.get(type_, {})
            stamp = known.get("lastTransitionTime", "") if known.get("status") == words["status"] else self.api.stamp()
            conditions[type_] = {"type": type_, "lastTransitionTime": stamp} | words
            new["status"]["conditions"] = list(conditions.values())

        return self.api.change("pods", pod, mutate, by=by)


def index_of(pod: Object) -> int:
    return int(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX])
