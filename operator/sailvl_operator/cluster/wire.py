"""What is read of Jobs, pods and Services: objects are decoded to these fields alone, the rest is skipped unparsed."""

from __future__ import annotations

from typing import Any, TypedDict


class Owner(TypedDict, total=False):
    uid: str
    controller: bool


class Metadata(TypedDict, total=False):
    name: str
    namespace: str
    uid: str
    resourceVersion: str
    creationTimestamp: str | None
    deletionTimestamp: str
    labels: dict[str, str]
    ownerReferences: list[Owner]


class Resources(TypedDict, total=False):
    limits: dict[str, str]


class Container(TypedDict, total=False):
    name: str
    resources: Resources


class TemplateSpec(TypedDict, total=False):
    containers: list[Container]


class Template(TypedDict, total=False):
    spec: TemplateSpec


class JobSpec(TypedDict, total=False):
    completions: int
    suspend: bool
    template: Template


class Waiting(TypedDict, total=False):
    reason: str
    message: str


class Terminated(TypedDict, total=False):
    exitCode: int
    reason: str
    message: str
    finishedAt: str | None


class ContainerState(TypedDict, total=False):
    waiting: Waiting
    terminated: Terminated


class ContainerStatus(TypedDict, total=False):
    name: str
    state: ContainerState


class Condition(TypedDict, total=False):
    type: str
    status: str
    reason: str
    message: str
    lastTransitionTime: str | None


class JobStatus(TypedDict, total=False):
    startTime: str | None
    conditions: list[Condition]


class Job(TypedDict, total=False):
    metadata: Metadata
    spec: JobSpec
    status: JobStatus


class PodSpec(TypedDict, total=False):
    nodeName: str
    schedulerName: str


class PodStatus(TypedDict, total=False):
    phase: str
    podIP: str
    conditions: list[Condition]
    containerStatuses: list[ContainerStatus]


class Pod(TypedDict, total=False):
    metadata: Metadata
    spec: PodSpec
    status: PodStatus


class Service(TypedDict, total=False):
    metadata: Metadata


class Nothing(TypedDict):
    """Of an answer that nobody reads."""


ObjectType = Any
"""One of these types, or dict for a whole object."""
