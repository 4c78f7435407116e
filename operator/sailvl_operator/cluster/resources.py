"""Resources that the operator uses: their paths on the API server, and the fields that are decoded from their objects.

msgspec skips all other fields without parsing them. Names are those of the Kubernetes API, and of its Go types where
these have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec

from sailvl_operator.api import names


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """A namespaced resource.

    `api_version`: group and version, as in manifests; `plural`: its name in URLs.
    """

    api_version: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the path of a collection, or of an object if it is named; without a namespace, of all namespaces."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        tail = "".join(f"/{part}" for part in (self.plural, name, subresource) if part)
        return root + scope + tail


RUNS = Resource(api_version=names.API_VERSION, plural=names.PLURAL)
JOBS = Resource(api_version="batch/v1", plural="jobs")
PODS = Resource(api_version="v1", plural="pods")
SERVICES = Resource(api_version="v1", plural="services")
NETWORK_POLICIES = Resource(api_version="networking.k8s.io/v1", plural="networkpolicies")
CLAIMS = Resource(api_version="v1", plural="persistentvolumeclaims")
EVENTS = Resource(api_version="v1", plural="events")
LEASES = Resource(api_version="coordination.k8s.io/v1", plural="leases")
WORKLOADS = tuple(
    Resource(api_version=f"kueue.x-k8s.io/{version}", plural="workloads") for version in ("v1beta2", "v1beta1")
)
"""Kueue's Workloads, one per queued Job, newest version first. They only exist if Kueue is installed."""


class OwnerReference(TypedDict, total=False):
    kind: str
    name: str
    uid: str
    controller: bool


class ObjectMeta(TypedDict, total=False):
    name: str
    namespace: str
    uid: str
    resourceVersion: str
    creationTimestamp: str | None
    deletionTimestamp: str
    labels: dict[str, str]
    ownerReferences: list[OwnerReference]


class ResourceRequirements(TypedDict, total=False):
    limits: dict[str, str]


class Container(TypedDict, total=False):
    name: str
    resources: ResourceRequirements


class TemplatePodSpec(TypedDict, total=False):
    containers: list[Container]


class PodTemplateSpec(TypedDict, total=False):
    spec: TemplatePodSpec


class JobSpec(TypedDict, total=False):
    completionMode: str
    completions: int
    parallelism: int
    suspend: bool
    template: PodTemplateSpec


class ContainerStateWaiting(TypedDict, total=False):
    reason: str
    message: str


class ContainerStateTerminated(TypedDict, total=False):
    exitCode: int
    reason: str
    message: str
    finishedAt: str | None


class ContainerState(TypedDict, total=False):
    waiting: ContainerStateWaiting
    terminated: ContainerStateTerminated


class ContainerStatus(TypedDict, total=False):
    name: str
    state: ContainerState


class ObjectCondition(TypedDict, total=False):
    type: str
    status: str
    reason: str
    message: str
    lastTransitionTime: str | None


class JobStatus(TypedDict, total=False):
    startTime: str | None
    conditions: list[ObjectCondition]


class Job(TypedDict, total=False):
    metadata: ObjectMeta
    spec: JobSpec
    status: JobStatus


class PodSpec(TypedDict, total=False):
    nodeName: str
    hostNetwork: bool
    schedulerName: str


class PodStatus(TypedDict, total=False):
    phase: str
    podIP: str
    conditions: list[ObjectCondition]
    containerStatuses: list[ContainerStatus]


class Pod(TypedDict, total=False):
    metadata: ObjectMeta
    spec: PodSpec
    status: PodStatus


class Service(TypedDict, total=False):
    metadata: ObjectMeta


class NetworkPolicy(TypedDict, total=False):
    metadata: ObjectMeta
    spec: msgspec.Raw


class PersistentVolumeClaim(TypedDict, total=False):
    metadata: ObjectMeta


class EventSeries(TypedDict, total=False):
    lastObservedTime: str | None


class CoreEvent(TypedDict, total=False):
    reason: str
    message: str
    series: EventSeries | None
    lastTimestamp: str | None
    eventTime: str | None


class WorkloadStatus(TypedDict, total=False):
    conditions: list[ObjectCondition]


class Workload(TypedDict, total=False):
    status: WorkloadStatus


RunAnnotations = TypedDict("RunAnnotations", {names.ANNOTATION_RESTART: str}, total=False)  # type: ignore[misc]
"""The annotations of a run that are read."""


class RunMeta(TypedDict, total=False):
    name: str
    namespace: str
    uid: str
    resourceVersion: str
    generation: int
    creationTimestamp: str | None
    deletionTimestamp: str
    annotations: RunAnnotations | None


class SailVLRun(TypedDict, total=False):
    """A run, whose other metadata is skipped: users may fill labels, annotations and managed fields with 1.5 MiB."""

    metadata: RunMeta
    spec: msgspec.Raw
    spec_bytes: int
    """Size of a spec as JSON that was left out, because it is too large."""
    status: dict[str, Any] | None


class VersionMeta(TypedDict, total=False):
    name: str
    namespace: str
    resourceVersion: str


class Versioned(TypedDict, total=False):
    """Any object, of which only the version is read."""

    metadata: VersionMeta


class Ignored(TypedDict):
    """Response whose content is not used."""


ObjectType = Any
"""One of these types, or dict for a whole object."""
