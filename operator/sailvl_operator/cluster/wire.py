"""Fields that are decoded from Jobs, pods and Services; msgspec skips all others without parsing them.

Names are those of the Kubernetes API, and of its Go types where these have one.
"""

from __future__ import annotations

from typing import Any, TypedDict


class OwnerReference(TypedDict, total=False):
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
    completions: int
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


class Ignored(TypedDict):
    """Response whose content is not used."""


ObjectType = Any
"""One of these types, or dict for a whole object."""
