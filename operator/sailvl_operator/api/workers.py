"""The part of the spec that describes the pods of a stage: nodes, resources, scheduling and environment."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import BY_NAME, LABEL_VALUE, VARIABLE, Labels, LabelValue, ObjectName, Quantity, Struct

MAX_NODES = 9999
"""Largest number of workers of a stage."""
MAX_GPUS = 64
"""Largest number of GPUs of a worker."""


class EnvVar(Struct, frozen=True, kw_only=True):
    """Environment variable of the workers."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=VARIABLE)]
    """Name of the variable. Names that begin with SAILVL_ are reserved."""
    value: Annotated[str, Meta(max_length=1024)] = ""
    """Value of the variable. Defaults to the empty string."""


class SourceRef(Struct, frozen=True, kw_only=True):
    """Reference to a Secret or a ConfigMap in the namespace of the run."""

    name: ObjectName
    """Name of the object."""
    optional: bool = False
    """Whether workers start if the object does not exist."""


class EnvFrom(Struct, frozen=True, kw_only=True):
    """Source of environment variables: a Secret (secretRef) or a ConfigMap (configMapRef)."""

    secret_ref: SourceRef | UnsetType = UNSET
    """Secret whose keys become environment variables."""
    config_map_ref: SourceRef | UnsetType = UNSET
    """ConfigMap whose keys become environment variables."""


class Toleration(Struct, frozen=True, kw_only=True):
    """Taint that the workers tolerate, as in a pod."""

    key: Annotated[str, Meta(max_length=316)] | UnsetType = UNSET
    """Key of the taint. If unset, operator must be Exists, and every taint is tolerated."""
    operator: Literal["Exists", "Equal"] | UnsetType = UNSET
    """How the value is compared: Exists matches any value. Defaults to Equal."""
    value: LabelValue | UnsetType = UNSET
    """Value of the taint. Only used with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | UnsetType = UNSET
    """Effect of the taint. Defaults to every effect."""
    toleration_seconds: int | UnsetType = UNSET
    """Seconds for which a taint with effect NoExecute is tolerated. Defaults to no limit."""


class Resources(Struct, frozen=True, kw_only=True):
    """Compute resources of one pod, as in a container. GPUs are requested by gpusPerNode, not here."""

    requests: Annotated[dict[str, Quantity], Meta(max_length=16)] = msgspec.field(default_factory=dict)
    """Resources that the scheduler reserves: cpu, memory, ephemeral-storage and others."""
    limits: Annotated[dict[str, Quantity], Meta(max_length=16)] = msgspec.field(default_factory=dict)
    """Maximum resources that a worker may use."""


class Workers(Struct, frozen=True, kw_only=True):
    """Pods of a stage. Changes take effect at the next attempt and do not invalidate the result of the stage."""

    nodes: Annotated[int, Meta(ge=1, le=MAX_NODES)] | UnsetType = UNSET
    """Number of pods. Each is placed on its own node if enough nodes are available. Defaults to 1."""
    gpus_per_node: Annotated[int, Meta(ge=0, le=MAX_GPUS)] | UnsetType = UNSET
    """Number of GPUs per pod, one rank each; 0 runs one rank on the CPU. Defaults to 8."""
    resources: Resources | UnsetType = UNSET
    """Requests and limits of each pod. GPUs are added from gpusPerNode."""
    shared_memory: Quantity | UnsetType = UNSET
    """Maximum size of /dev/shm, which counts as memory of the pod. Defaults to the memory limit, or to 16Gi without
    one."""
    temporary_storage: Quantity | UnsetType = UNSET
    """Maximum size of /tmp, where weights from the Hugging Face Hub are cached. Defaults to the limit of
    ephemeral-storage, or to 100Gi without one."""
    node_selector: Labels | UnsetType = UNSET
    """Labels that a node must have to run the workers."""
    tolerations: Annotated[tuple[Toleration, ...], Meta(max_length=16)] | UnsetType = UNSET
    """Taints that the workers tolerate."""
    priority_class_name: ObjectName | UnsetType = UNSET
    """Name of the PriorityClass of the pods."""
    service_account_name: ObjectName | UnsetType = UNSET
    """Name of the ServiceAccount of the pods, which the workload identity of a cloud provider refers to. Its token is
    not mounted. Defaults to the default account of the namespace."""
    scheduler_name: ObjectName | UnsetType = UNSET
    """Name of the scheduler. Defaults to the default scheduler of the cluster."""
    env: Annotated[tuple[EnvVar, ...], Meta(max_length=64, extra_json_schema=BY_NAME)] | UnsetType = UNSET
    """Environment variables of the workers."""
    env_from: Annotated[tuple[EnvFrom, ...], Meta(max_length=16)] | UnsetType = UNSET
    """Secrets and ConfigMaps whose keys become environment variables, for example an HF_TOKEN."""
    labels: Labels | UnsetType = UNSET
    """Additional labels of the pods, for example the pod group of a gang scheduler."""
    queue_name: Annotated[str, Meta(min_length=1, max_length=63, pattern=LABEL_VALUE)] | UnsetType = UNSET
    """Name of a Kueue LocalQueue. Jobs are created suspended, and Kueue decides when they start."""
