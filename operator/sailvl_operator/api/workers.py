"""Where a stage runs, typed: the part of the spec that its pods get."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import BY_NAME, LABEL_VALUE, VARIABLE, Labels, LabelValue, ObjectName, Quantity, Struct


class EnvVar(Struct, frozen=True, kw_only=True):
    """A variable of the workers' environment."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=VARIABLE)]
    """SAILVL_* is the operator's."""
    value: Annotated[str, Meta(max_length=1024)] = ""
    """Default: empty."""


class SourceRef(Struct, frozen=True, kw_only=True):
    """A Secret or a ConfigMap in the run's namespace."""

    name: ObjectName
    """Of the object."""
    optional: bool = False
    """true: workers start without it too."""


class EnvFrom(Struct, frozen=True, kw_only=True):
    """Exactly one of secretRef and configMapRef."""

    secret_ref: SourceRef | UnsetType = UNSET
    """A Secret, each key a variable."""
    config_map_ref: SourceRef | UnsetType = UNSET
    """A ConfigMap, each key a variable."""


class Toleration(Struct, frozen=True, kw_only=True):
    """As in a pod: the taint that workers don't mind."""

    key: Annotated[str, Meta(max_length=316)] | UnsetType = UNSET
    """Of the taint. Default: every taint, with operator Exists."""
    operator: Literal["Exists", "Equal"] | UnsetType = UNSET
    """Default Equal."""
    value: LabelValue | UnsetType = UNSET
    """Of the taint, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | UnsetType = UNSET
    """Default: every effect."""
    toleration_seconds: int | UnsetType = UNSET
    """NoExecute: how long. Default: for ever."""


class Resources(Struct, frozen=True, kw_only=True):
    """Of one pod, as in a container. GPUs are gpusPerNode's to ask for."""

    requests: Annotated[dict[str, Quantity], Meta(max_length=16)] = msgspec.field(default_factory=dict)
    """What the scheduler sets aside: cpu, memory, …"""
    limits: Annotated[dict[str, Quantity], Meta(max_length=16)] = msgspec.field(default_factory=dict)
    """What a worker may use at most."""


class Workers(Struct, frozen=True, kw_only=True):
    """Where a stage runs. Changed workers take effect at the next attempt; they are no part of a stage's digest."""

    nodes: Annotated[int, Meta(ge=1, le=9999)] | UnsetType = UNSET
    """Pods of the stage, each on a node of its own where there are enough. Default 1."""
    gpus_per_node: Annotated[int, Meta(ge=0, le=64)] | UnsetType = UNSET
    """GPUs a pod; 0: CPU and gloo. Default 8."""
    resources: Resources | UnsetType = UNSET
    """Requests and limits a pod; GPUs are added by gpusPerNode."""
    node_selector: Labels | UnsetType = UNSET
    """Labels that a node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Meta(max_length=16)] | UnsetType = UNSET
    """Taints that the workers don't mind."""
    priority_class_name: ObjectName | UnsetType = UNSET
    """The pods' PriorityClass."""
    scheduler_name: ObjectName | UnsetType = UNSET
    """Another scheduler than the cluster's default."""
    env: Annotated[tuple[EnvVar, ...], Meta(max_length=64, extra_json_schema=BY_NAME)] | UnsetType = UNSET
    """Variables of the workers' environment."""
    env_from: Annotated[tuple[EnvFrom, ...], Meta(max_length=16)] | UnsetType = UNSET
    """Secrets and ConfigMaps whose keys become variables, say tokens of a hub."""
    labels: Labels | UnsetType = UNSET
    """Extra labels of the pods, for pod groups of a gang scheduler and the like."""
    queue_name: Annotated[str, Meta(min_length=1, max_length=63, pattern=LABEL_VALUE)] | UnsetType = UNSET
    """Kueue's local queue; the Job's suspend is then Kueue's."""
