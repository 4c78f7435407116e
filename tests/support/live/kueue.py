"""A small Kueue for tests on a real cluster that has none: a Workload for each suspended Job of a queue, admission
within a quota of pods by priority and age, and preemption of lower priorities.

It follows Kueue's batch/job integration: admission resumes the Job in one patch with the flavor's node labels and
tolerations; eviction suspends it, resets its start time and removes them again; a Job that another client resumes is
suspended again.
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
from tests.support.live.api import DEFINITIONS, PRIORITIES, ApiStatusError, ClusterApi, Object, build_object, wait_until

QUEUE = "kueue.x-k8s.io/queue-name"
JOB_UID = "kueue.x-k8s.io/job-uid"
STOPPING = "kueue.x-k8s.io/stopping"
POD_SET = "kueue.x-k8s.io/podset"
FLAVOR: Object = {
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "reserved-for-queues", "operator": "Exists", "effect": "NoSchedule"}],
}
"""Added to the pod template of an admitted Job."""

VERSIONS = ("v1beta1", "v1beta2")
"""Versions of Workload: FakeKueue served the first until August 2026, and serves the second since 0.15."""


def get_workload_resource(version: str) -> Resource:
    """Return the resource of Workloads in a version."""
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
_INTERVAL_SECONDS = 0.3


@contextmanager
def install_workloads(api: ClusterApi) -> Iterator[bool]:
    """Install a permissive definition of Workloads; yield False if the cluster has a Kueue of its own."""
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


def serve_workloads(api: ClusterApi, version: str) -> None:
    """Serve one version of Workloads and no other."""
    api.patch(DEFINITIONS, _NAME, {"spec": {"versions": _build_versions(version)}})

    def is_served(version: str) -> bool:
        try:
            return api.list(get_workload_resource(version)) is not None
        except ApiStatusError:
            return False

    wait_until(lambda: [is_served(each) for each in VERSIONS] == [each == version for each in VERSIONS])


@dataclass(kw_only=True, slots=True)
class _QueuedJob:
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
class FakeKueue:
    """Runs in a thread of its own while it is used as a context manager."""

    api: ClusterApi
    """Used by its thread only."""
    namespace: str
    quotas: dict[str, int]
    """Maximum number of pods by queue; other queues don't exist. May be changed at any time."""
    to_evict: set[str] = field(default_factory=set)
    """Names of Jobs that an administrator evicts once."""
    workloads: Resource = get_workload_resource(VERSIONS[-1])  # noqa: RUF009  # frozen
    """Workloads in the served version."""
    resumed: list[str] = field(default_factory=list)
    """Names of the Jobs that it resumed, in order."""
    violations: list[str] = field(default_factory=list)
    """Changes of `suspend` by other clients."""
    failure: BaseException | None = None

    def __enter__(self) -> FakeKueue:
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
        while not self._stop.wait(_INTERVAL_SECONDS):
            try:
                self.run_once()
            except ApiStatusError as error:  # another client was faster; the next round reads its change
                logging.getLogger("kueue").info("%s", error)
                if error.code not in (404, 409, 422):
                    self.failure = error
                    return
            except BaseException as error:  # noqa: BLE001  # raised again at the end of the block
                self.failure = error
                return

    def run_once(self) -> None:
        """Reconcile all Jobs once."""
        jobs = [job for job in self.api.list(JOBS, self.namespace, QUEUE) if not _is_deleting(job)]
        workloads = {w["metadata"]["labels"][JOB_UID]: w for w in self.api.list(self.workloads, self.namespace)}
        for job in jobs:
            self._audit(job)
        for job in [job for job in jobs if job["metadata"]["uid"] not in workloads]:
            workloads[job["metadata"]["uid"]] = self._create_workload(job)
        queued = [_QueuedJob(job=job, workload=workloads[job["metadata"]["uid"]]) for job in jobs]
        for each in queued:
            self._apply_workload(each)
        for name in self.quotas:
            self._admit_from(name, [each for each in queued if each.queue == name])
        for each in queued:
            if each.queue not in self.quotas:
                self._set_pending(each, "Inadmissible", f"LocalQueue {each.queue} doesn't exist")

    def _audit(self, job: Object) -> None:
        """Record a violation if another client owns `suspend` of a Job that was resumed."""
        name, managed = job["metadata"]["name"], job["metadata"]["managedFields"]
        owners = [m["manager"] for m in managed if "f:suspend" in m["fieldsV1"].get("f:spec", {})]
        if owners != ["kueue"] and (name in self.resumed or not job["spec"].get("suspend")):
            self.violations.append(f"{name}: suspend is {job['spec'].get('suspend')} by {owners}")

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

    def _apply_workload(self, each: _QueuedJob) -> None:
        """Make a Job follow the conditions of its Workload."""
        if each.is_finished:
            if not each.has("Finished"):
                self._set_conditions(each, Finished=("True", "JobFinished", "Job finished"))
            return
        if each.job["metadata"]["name"] in self.to_evict and each.has("Admitted"):
            self.to_evict.discard(each.job["metadata"]["name"])
            self._evict(each, "The workload is evicted by an administrator")
        if each.has("Evicted") and each.has("QuotaReserved"):
            self._suspend_job(each)
            if not each.job.get("status", {}).get("active"):
                reservation = ("False", "NoReservation", "The workload has no reservation")
                self._set_conditions(each, QuotaReserved=("False", "Pending", "Evicted"), Admitted=reservation)
        elif each.has("Admitted") and each.is_suspended:
            self._resume_job(each)
        elif not each.has("Admitted") and not each.is_suspended:
            self._suspend_job(each)

    def _admit_from(self, queue: str, queued: list[_QueuedJob]) -> None:
        """Admit the Jobs that fit, by priority and then by age."""
        active = [each for each in queued if not each.has("Finished")]
        used = sum(each.pods for each in active if each.has("QuotaReserved"))
        waiting = sorted((each for each in active if not each.has("QuotaReserved")), key=_order)
        for each in waiting:
            missing = used + each.pods - self.quotas[queue]
            if missing <= 0:
                used += each.pods
                self._admit(each)
                continue
            reason = f"insufficient unused quota for pods in flavor default, {missing} more needed"
            self._set_pending(each, "Pending", f"couldn't assign flavors to pod set main: {reason}")
            self._preempt_for(each, [other for other in active if other.has("QuotaReserved")])

    def _preempt_for(self, each: _QueuedJob, admitted: list[_QueuedJob]) -> None:
        lower = [p for p in admitted if p.workload["spec"]["priority"] < each.workload["spec"]["priority"]]
        if lower and not any(p.has("Evicted") for p in admitted):
            victim = max(lower, key=_order)
            uid = each.workload["metadata"]["uid"]
            self._evict(victim, f"Preempted to accommodate a workload (UID: {uid}) due to prioritization")

    def _evict(self, each: _QueuedJob, message: str) -> None:
        self._set_conditions(each, Evicted=("True", "Preempted", message))

    def _admit(self, each: _QueuedJob) -> None:
        requeued = {"Evicted": ("False", "QuotaReserved", "Previously: Preempted")} if each.has("Evicted") else {}
        reserved = ("True", "QuotaReserved", f"Quota reserved in ClusterQueue {each.queue}")
        self._set_conditions(
            each, QuotaReserved=reserved, Admitted=("True", "Admitted", "The workload is admitted"), **requeued
        )

    def _set_pending(self, each: _QueuedJob, reason: str, message: str) -> None:
        if not each.has("Finished"):
            self._set_conditions(each, QuotaReserved=("False", reason, message))

    def _set_conditions(self, each: _QueuedJob, **conditions: tuple[str, str, str]) -> None:
        """ForwardedWrite conditions of the Workload if they differ."""
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

    def _resume_job(self, each: _QueuedJob) -> None:
        template = each.workload["spec"]["podSets"][0]["template"]["spec"]
        tolerations = template.get("tolerations", []) + FLAVOR["tolerations"]
        pod = {"nodeSelector": FLAVOR["nodeSelector"], "tolerations": tolerations}
        labels = {POD_SET: "main"}
        self._patch_job(each, {"spec": {"suspend": False, "template": {"metadata": {"labels": labels}, "spec": pod}}})
        self.resumed.append(each.job["metadata"]["name"])

    def _suspend_job(self, each: _QueuedJob) -> None:
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

    def _patch_job(self, each: _QueuedJob, body: dict[str, Any], subresource: str = "") -> None:
        """Patch a Job with the resourceVersion that was read as a precondition."""
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


def _order(each: _QueuedJob) -> tuple[int, str, str]:
    metadata = each.workload["metadata"]
    return -each.workload["spec"]["priority"], metadata["creationTimestamp"], metadata["name"]
