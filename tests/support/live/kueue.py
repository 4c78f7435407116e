"""What Kueue does to Jobs, in small, for tests on a real cluster that has none: a Workload for each suspended Job of a
queue, admission within a quota of pods by priority and age, eviction of those with less priority.

As Kueue's batch/job integration: admission lets the Job go in one patch with the flavor's node labels and tolerations;
eviction suspends it, resets its start time and takes them off again; a Job that is let go by somebody else is stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sailvl_operator.cluster.resources import JOBS, Resource
from tests.support.live.api import DEFINITIONS, PRIORITIES, Api, Object, Refused, build_object, until

QUEUE = "kueue.x-k8s.io/queue-name"
JOB_UID = "kueue.x-k8s.io/job-uid"
STOPPING = "kueue.x-k8s.io/stopping"
POD_SET = "kueue.x-k8s.io/podset"
FLAVOR: Object = {
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "reserved-for-queues", "operator": "Exists", "effect": "NoSchedule"}],
}
"""What a pod gets that is admitted."""

VERSIONS = ("v1beta1", "v1beta2")
"""Of the Workload: Kueue served the first until August 2026, the second since 0.15."""


def at_version(version: str) -> Resource:
    """Where Workloads of a version are."""
    return Resource(api_version=f"kueue.x-k8s.io/{version}", plural="workloads")


def _build_versions(served: str) -> list[Object]:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return [
        {"name": each, "served": each == served, "storage": each == VERSIONS[0], "schema": schema}
        | {"subresources": {"status": {}}}
        for each in VERSIONS
    ]


_EXTENSIONS = "apiextensions.k8s.io/v1"
_NAME, _LABELS = "workloads.kueue.x-k8s.io", {"test": "kueue"}
_PERIOD = 0.3


@contextmanager
def install_workloads(api: Api) -> Iterator[bool]:
    """The definition of Workloads, as permissive as can be. False: the cluster has a Kueue of its own."""
    present = api.get(DEFINITIONS, _NAME)
    if present is not None and present["metadata"].get("labels") != _LABELS:
        yield False
        return
    try:
        if present is None:
            names = {"kind": "Workload", "plural": "workloads", "singular": "workload", "listKind": "WorkloadList"}
            spec = {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names}
            spec["versions"] = _build_versions(VERSIONS[-1])
            api.create(
                DEFINITIONS, build_object("CustomResourceDefinition", _NAME, _EXTENSIONS, labels=_LABELS, spec=spec)
            )
        serve_workloads(api, VERSIONS[-1])
        yield True
    finally:
        api.delete(DEFINITIONS, _NAME)


def serve_workloads(api: Api, version: str) -> None:
    """That version and no other."""
    api.patch(DEFINITIONS, _NAME, {"spec": {"versions": _build_versions(version)}})

    def is_served(version: str) -> bool:
        try:
            return api.list(at_version(version)) is not None
        except Refused:
            return False

    until(lambda: [is_served(each) for each in VERSIONS] == [each == version for each in VERSIONS])


@dataclass(kw_only=True, slots=True)
class _Queued:
    """A Job and its Workload."""

    job: Object
    workload: Object

    @property
    def queue(self) -> str:
        return self.workload["spec"]["queueName"]

    @property
    def pods(self) -> int:
        return self.workload["spec"]["podSets"][0]["count"]

    @property
    def is_suspended(self) -> bool:
        return self.job["spec"].get("suspend", False) and STOPPING not in self.job["metadata"].get("annotations", {})

    @property
    def is_finished(self) -> bool:
        return "True" in (_find(self.job, "Complete"), _find(self.job, "Failed"))

    def has(self, condition: str) -> bool:
        return _find(self.workload, condition) == "True"


@dataclass(kw_only=True)
class Kueue:
    """Works in a thread of its own while it is used as a context manager."""

    api: Api
    """Of its thread alone."""
    namespace: str
    quotas: dict[str, int]
    """Pods at once, by queue; a queue that isn't here doesn't exist. May be changed at any time."""
    to_evict: set[str] = field(default_factory=set)
    """Names of Jobs that an administrator wants to lose their place once."""
    workloads: Resource = at_version(VERSIONS[-1])  # noqa: RUF009  # frozen
    """Of the version that is served."""
    let_go: list[str] = field(default_factory=list)
    """Names of the Jobs that it let go, in order."""
    trespasses: list[str] = field(default_factory=list)
    """What others did to the `suspend` of its Jobs."""
    failure: BaseException | None = None

    def __enter__(self) -> Kueue:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kueue")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self.work()
            except Refused as error:  # somebody was faster: the next round sees what they did
                logging.getLogger("kueue").info("%s", error)
                if error.code not in (404, 409, 422):
                    self.failure = error
                    return
            except BaseException as error:  # noqa: BLE001  # raised where the test can see it
                self.failure = error
                return

    def work(self) -> None:
        """One round over all Jobs."""
        jobs = [job for job in self.api.list(JOBS, self.namespace, QUEUE) if not _is_deleting(job)]
        workloads = {w["metadata"]["labels"][JOB_UID]: w for w in self.api.list(self.workloads, self.namespace)}
        for job in jobs:
            self._audit(job)
        for job in [job for job in jobs if job["metadata"]["uid"] not in workloads]:
            workloads[job["metadata"]["uid"]] = self._create_workload(job)
        queued = [_Queued(job=job, workload=workloads[job["metadata"]["uid"]]) for job in jobs]
        for each in queued:
            self._follow(each)
        for name in self.quotas:
            self._admit_from(name, [each for each in queued if each.queue == name])
        for each in queued:
            if each.queue not in self.quotas:
                self._refuse(each, "Inadmissible", f"LocalQueue {each.queue} doesn't exist")

    def _audit(self, job: Object) -> None:
        """Once Kueue let a Job go, its suspend is Kueue's."""
        name, managed = job["metadata"]["name"], job["metadata"]["managedFields"]
        owners = [m["manager"] for m in managed if "f:suspend" in m["fieldsV1"].get("f:spec", {})]
        if owners != ["kueue"] and (name in self.let_go or not job["spec"].get("suspend")):
            self.trespasses.append(f"{name}: suspend is {job['spec'].get('suspend')} by {owners}")

    def _create_workload(self, job: Object) -> Object:
        metadata, template = job["metadata"], job["spec"]["template"]
        body = build_object(
            "Workload",
            f"job-{metadata['name']}-{metadata['uid'][:5]}",
            self.workloads.api_version,
            namespace=self.namespace,
            labels={JOB_UID: metadata["uid"]},
        )
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        body["metadata"]["ownerReferences"] = [owner | {"controller": True, "blockOwnerDeletion": True}]
        pods = {"name": "main", "count": job["spec"]["parallelism"], "template": template}
        priority = self._find_priority(template["spec"].get("priorityClassName"))
        body["spec"] = {"queueName": metadata["labels"][QUEUE], "podSets": [pods], "priority": priority}
        return self.api.create(self.workloads, body)

    def _find_priority(self, name: str | None) -> int:
        found = self.api.get(PRIORITIES, name) if name else None
        return 0 if found is None else found["value"]

    def _follow(self, each: _Queued) -> None:
        """The Job does as its Workload says."""
        if each.is_finished:
            if not each.has("Finished"):
                self._tell(each, Finished=("True", "JobFinished", "Job finished"))
            return
        if each.job["metadata"]["name"] in self.to_evict and each.has("Admitted"):
            self.to_evict.discard(each.job["metadata"]["name"])
            self._evict(each, "The workload is evicted by an administrator")
        if each.has("Evicted") and each.has("QuotaReserved"):
            self._stop_job(each)
            if not each.job.get("status", {}).get("active"):
                reservation = ("False", "NoReservation", "The workload has no reservation")
                self._tell(each, QuotaReserved=("False", "Pending", "Evicted"), Admitted=reservation)
        elif each.has("Admitted") and each.is_suspended:
            self._start_job(each)
        elif not each.has("Admitted") and not each.is_suspended:
            self._stop_job(each)

    def _admit_from(self, queue: str, queued: list[_Queued]) -> None:
        """Those that fit, the most important first and then the oldest."""
        active = [each for each in queued if not each.has("Finished")]
        used = sum(each.pods for each in active if each.has("QuotaReserved"))
        waiting = sorted((each for each in active if not each.has("QuotaReserved")), key=_order)
        for each in waiting:
            missing = used + each.pods - self.quotas[queue]
            if missing <= 0:
                used += each.pods
                self._admit(each)
                continue
            words = f"insufficient unused quota for pods in flavor default, {missing} more needed"
            self._refuse(each, "Pending", f"couldn't assign flavors to pod set main: {words}")
            self._make_room(each, [other for other in active if other.has("QuotaReserved")])

    def _make_room(self, each: _Queued, placed: list[_Queued]) -> None:
        lesser = [p for p in placed if p.workload["spec"]["priority"] < each.workload["spec"]["priority"]]
        if lesser and not any(p.has("Evicted") for p in placed):
            victim = max(lesser, key=_order)
            uid = each.workload["metadata"]["uid"]
            self._evict(victim, f"Preempted to accommodate a workload (UID: {uid}) due to prioritization")

    def _evict(self, each: _Queued, words: str) -> None:
        self._tell(each, Evicted=("True", "Preempted", words))

    def _admit(self, each: _Queued) -> None:
        again = {"Evicted": ("False", "QuotaReserved", "Previously: Preempted")} if each.has("Evicted") else {}
        reserved = ("True", "QuotaReserved", f"Quota reserved in ClusterQueue {each.queue}")
        self._tell(each, QuotaReserved=reserved, Admitted=("True", "Admitted", "The workload is admitted"), **again)

    def _refuse(self, each: _Queued, reason: str, words: str) -> None:
        if not each.has("Finished"):
            self._tell(each, QuotaReserved=("False", reason, words))

    def _tell(self, each: _Queued, **conditions: tuple[str, str, str]) -> None:
        """Conditions of the Workload, written if they differ."""
        old = {c["type"]: c for c in each.workload.get("status", {}).get("conditions", [])}
        new = {
            type_: {"type": type_, "status": status, "reason": reason, "message": message}
            for type_, (status, reason, message) in conditions.items()
        }
        if all(_without_time(old.get(type_, {})) == condition for type_, condition in new.items()):
            return
        now = {"lastTransitionTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        merged = old | {type_: condition | now for type_, condition in new.items()}
        body = {"status": {"conditions": list(merged.values())}}
        name = each.workload["metadata"]["name"]
        each.workload = self.api.patch(self.workloads, name, body, self.namespace, "status")

    def _start_job(self, each: _Queued) -> None:
        template = each.workload["spec"]["podSets"][0]["template"]["spec"]
        tolerations = template.get("tolerations", []) + FLAVOR["tolerations"]
        pod = {"nodeSelector": FLAVOR["nodeSelector"], "tolerations": tolerations}
        labels = {POD_SET: "main"}
        self._patch_job(each, {"spec": {"suspend": False, "template": {"metadata": {"labels": labels}, "spec": pod}}})
        self.let_go.append(each.job["metadata"]["name"])

    def _stop_job(self, each: _Queued) -> None:
        if each.is_suspended:
            return
        self._patch_job(each, {"metadata": {"annotations": {STOPPING: "true"}}, "spec": {"suspend": True}})
        if each.job.get("status", {}).get("startTime"):
            self._patch_job(each, {"status": {"startTime": None}}, "status")
        template = each.workload["spec"]["podSets"][0]["template"]["spec"]
        selector = dict.fromkeys(FLAVOR["nodeSelector"]) | template.get("nodeSelector", {})
        pod = {"nodeSelector": selector, "tolerations": template.get("tolerations", [])}
        restored = {"template": {"metadata": {"labels": {POD_SET: None}}, "spec": pod}}
        self._patch_job(each, {"metadata": {"annotations": {STOPPING: None}}, "spec": restored})

    def _patch_job(self, each: _Queued, body: dict[str, Any], subresource: str = "") -> None:
        """Against the very version that was looked at."""
        metadata = body.setdefault("metadata", {})
        metadata["resourceVersion"] = each.job["metadata"]["resourceVersion"]
        each.job = self.api.patch(JOBS, each.job["metadata"]["name"], body, self.namespace, subresource)


def _find(raw: Object, condition: str) -> str:
    conditions = raw.get("status", {}).get("conditions") or []
    return next((c["status"] for c in conditions if c["type"] == condition), "")


def _without_time(condition: Object) -> Object:
    return {name: value for name, value in condition.items() if name != "lastTransitionTime"}


def _is_deleting(raw: Object) -> bool:
    return "deletionTimestamp" in raw["metadata"]


def _order(each: _Queued) -> tuple[int, str, str]:
    metadata = each.workload["metadata"]
    return -each.workload["spec"]["priority"], metadata["creationTimestamp"], metadata["name"]
