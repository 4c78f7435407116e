"""Build the pods of an attempt within the `restricted` Pod Security Standard.

Pods run as a numeric user with a read-only root, no privileges and no service account token. Besides the storage they
may write only to /tmp and to a memory-backed /dev/shm.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from torchx.specs import Role

from sailvl_operator.api import names
from sailvl_operator.api.scalars import Quantity
from sailvl_operator.api.workers import Resources
from sailvl_operator.core.decision import AttemptSpec
from sailvl_operator.core.desired.workload import build_defaults
from sailvl_trainer.contract import Env

USER = 65532
"""User of the container image, and group of the files on the storage."""
NODE_LOSS_SECONDS = 20
"""Seconds after which pods of an unreachable node are evicted; the default of Kubernetes is 300."""
_SIZE_LIMITS = {"temporary_storage": ("ephemeral-storage", "100Gi"), "shared_memory": ("memory", "16Gi")}
"""Resource whose limit is the default size of a volume, and the size without that limit, by field of the workers."""

_CONTRACT_VARIABLES = frozenset(map(str, Env))


def build_pod_spec(attempt: AttemptSpec, role: Role, job: str) -> dict[str, Any]:
    """Build the pod spec; `job` is the name of the Job, whose pods are spread over the nodes."""
    workers = attempt.workers
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "subdomain": names.service_name(attempt.document.run),
        "terminationGracePeriodSeconds": attempt.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [_build_spread(job)],
        "tolerations": _build_tolerations(attempt),
        "containers": [_build_container(attempt, role)],
        "volumes": _build_volumes(attempt),
    }
    optional = {
        "affinity": _build_affinity(attempt),
        "nodeSelector": workers.node_selector,
        "priorityClassName": workers.priority_class_name,
        "serviceAccountName": workers.service_account_name,
        "schedulerName": workers.scheduler_name,
    }
    return spec | {name: value for name, value in optional.items() if value is not msgspec.UNSET and value}


def _build_container(attempt: AttemptSpec, role: Role) -> dict[str, Any]:
    env_from = attempt.workers.env_from
    container: dict[str, Any] = {
        "name": names.CONTAINER,
        "image": role.image,
        "imagePullPolicy": attempt.image_pull_policy,
        "command": [role.entrypoint, *role.args],
        "env": _build_env(attempt, role),
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in role.port_map.items()],
        "resources": _build_resources(attempt, role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _build_mounts(),
    }
    if env_from is not msgspec.UNSET and env_from:
        container["envFrom"] = msgspec.to_builtins(list(env_from))
    return container


def _build_env(attempt: AttemptSpec, role: Role) -> list[dict[str, Any]]:
    """Build the variables of a worker. Variables of the contract can't be overridden by the user."""
    references = {
        str(Env.NODE_RANK): f"metadata.labels['{names.LABEL_COMPLETION_INDEX}']",
        str(Env.NODE_NAME): "spec.nodeName",
    }
    if role.num_replicas > 1:  # worker 0 listens there
        references[str(Env.POD_IP)] = "status.podIP"
    given = () if attempt.workers.env is msgspec.UNSET else attempt.workers.env
    user = [{"name": e.name, "value": e.value} for e in given if e.name not in _CONTRACT_VARIABLES]
    is_imported = attempt.workers.env_from is not msgspec.UNSET and bool(attempt.workers.env_from)
    own = (build_defaults() if is_imported else {}) | role.env  # a Secret may set any variable
    return [
        *({"name": str(name), "value": value} for name, value in own.items() if name not in references),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in references.items()),
        *user,
    ]


def _build_resources(attempt: AttemptSpec, role: Role) -> dict[str, Any]:
    given = attempt.workers.resources
    requests = dict(given.requests) if given is not msgspec.UNSET else {}
    limits = dict(given.limits) if given is not msgspec.UNSET else {}
    if role.resource.gpu > 0:
        limits[names.GPU] = requests[names.GPU] = str(role.resource.gpu)
    return {name: value for name, value in (("requests", requests), ("limits", limits)) if value}


def _build_mounts() -> list[dict[str, Any]]:
    return [
        {"name": "storage", "mountPath": names.STORAGE_MOUNT},
        {"name": "stage", "mountPath": names.STAGE_MOUNT, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _build_volumes(attempt: AttemptSpec) -> list[dict[str, Any]]:
    document = {"path": "stage.json", "fieldRef": {"fieldPath": f"metadata.annotations['{names.ANNOTATION_STAGE}']"}}
    return [
        {"name": "storage", "persistentVolumeClaim": {"claimName": attempt.claim}},
        {"name": "stage", "downwardAPI": {"items": [document]}},
        {"name": "tmp", "emptyDir": {"sizeLimit": _find_size_limit(attempt, "temporary_storage")}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _find_size_limit(attempt, "shared_memory")}},
    ]


def _find_size_limit(attempt: AttemptSpec, field: Literal["temporary_storage", "shared_memory"]) -> str:
    """Return the size of a volume: as set, else the pod's limit of the resource that it takes, else a default."""
    given: Quantity | msgspec.UnsetType = getattr(attempt.workers, field)
    if given is not msgspec.UNSET:
        return given
    resource, default = _SIZE_LIMITS[field]
    resources = attempt.workers.resources
    return resources.limits.get(resource, default) if isinstance(resources, Resources) else default


def _build_spread(job: str) -> dict[str, Any]:
    """Prefer to spread workers over the nodes; an anti-affinity would cost the scheduler more."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {names.LABEL_JOB_NAME: job}},
    }


def _build_affinity(attempt: AttemptSpec) -> dict[str, Any]:
    """Build the affinity that forbids excluded nodes and avoids suspect ones while others have room."""
    node_affinity: dict[str, Any] = {}
    if attempt.excluded_nodes:
        terms = [{"matchFields": _exclude_nodes(attempt.excluded_nodes)}]
        node_affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    if attempt.suspect_nodes:
        preferred = [{"weight": 100, "preference": {"matchFields": _exclude_nodes(attempt.suspect_nodes)}}]
        node_affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return {"nodeAffinity": node_affinity} if node_affinity else {}


def _exclude_nodes(nodes: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in sorted(nodes)]


def _build_tolerations(attempt: AttemptSpec) -> list[dict[str, Any]]:
    given = attempt.workers.tolerations
    lost = [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOSS_SECONDS,
        }
        for taint in ("not-ready", "unreachable")
    ]
    return lost + ([] if given is msgspec.UNSET else msgspec.to_builtins(list(given)))
