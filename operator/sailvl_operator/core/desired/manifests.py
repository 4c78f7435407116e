"""Build the manifests of the objects that a run owns: its Service, its claim, and the Indexed Job of each attempt.

One write creates a whole attempt, because the pods carry the stage config as an annotation. `backoffLimitPerIndex: 0`
keeps failed pods as evidence of the cause (`backoffLimit: 0` deletes them within seconds). `podReplacementPolicy:
Failed` keeps the pods of a resumed Job from running beside pods that still terminate.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET
from torchx.specs import AppDef

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.core.decision import AttemptSpec
from sailvl_operator.core.desired.pod import build_pod_spec
from sailvl_operator.core.desired.workload import encode_document
from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT


def build_service(*, namespace: str, run: str, owner_uid: str) -> dict[str, Any]:
    """Build the headless Service that gives the workers of all stages and attempts their DNS names.

    Pods join it by their subdomain. The names exist before the workers are ready, because workers become ready only
    after their rendezvous.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(run),
            "namespace": namespace,
            "labels": build_labels(run),
            "ownerReferences": build_owner(run, owner_uid),
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": build_labels(run),
            "ports": [
                {"name": names.METRICS_PORT_NAME, "port": METRICS_PORT, "protocol": "TCP"},
                {"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"},
            ],
        },
    }


def build_claim(run: Run) -> dict[str, Any] | None:
    """Build the PersistentVolumeClaim of a run from its template; None if the run names an existing one.

    A claim that is retained when the run is deleted has no owner reference.
    """
    template = run.spec.storage.volume_claim_template
    if template is UNSET:
        return None
    spec: dict[str, Any] = {
        "accessModes": list(template.access_modes),
        "resources": {"requests": dict(template.resources.requests)},
    }
    if template.storage_class_name is not UNSET:
        spec["storageClassName"] = template.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": names.claim_name(run.name),
            "namespace": run.namespace,
            "labels": build_labels(run.name),
        }
        | ({"ownerReferences": build_owner(run.name, run.uid)} if run.spec.storage.when_deleted == "Delete" else {}),
        "spec": spec,
    }


def build_job(attempt: AttemptSpec, app: AppDef) -> dict[str, Any]:
    """Build the Job of an attempt; `app` is the result of `build_appdef` for the same attempt."""
    document = attempt.document
    labels = build_attempt_labels(document.run, document.stage, document.attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": app.name,
            "namespace": document.namespace,
            "labels": labels | {names.LABEL_DIGEST: document.digest[: names.DIGEST_LETTERS]} | _queue_label(attempt),
            "ownerReferences": build_owner(attempt.owner_name, attempt.owner_uid),
        },
        "spec": _build_spec(attempt, app, labels),
    }


def _build_spec(attempt: AttemptSpec, app: AppDef, labels: dict[str, str]) -> dict[str, Any]:
    nodes = app.roles[0].num_replicas
    extra = attempt.workers.labels
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimitPerIndex": 0,
        "podReplacementPolicy": "Failed",
        "suspend": _is_queued(attempt),
        "template": {
            "metadata": {
                "labels": (dict(extra) if isinstance(extra, dict) else {})
                | labels
                | {names.LABEL_RUN_UID: attempt.owner_uid},
                "annotations": {names.ANNOTATION_STAGE: encode_document(attempt.document)},
            },
            "spec": build_pod_spec(attempt, app.roles[0], app.name),
        },
    }


def _is_queued(attempt: AttemptSpec) -> bool:
    """Return whether the Job is created suspended, as Kueue requires of the Jobs that it admits."""
    return isinstance(attempt.workers.queue_name, str)


def _queue_label(attempt: AttemptSpec) -> dict[str, str]:
    queue = attempt.workers.queue_name
    return {names.LABEL_KUEUE_QUEUE: queue} if isinstance(queue, str) else {}


def build_labels(run: str) -> dict[str, str]:
    """Build the labels of any object of a run."""
    return {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: run}


def build_attempt_labels(run: str, stage: str, attempt: int) -> dict[str, str]:
    """Build the labels of an attempt's Job and pods."""
    return build_labels(run) | {names.LABEL_STAGE: stage, names.LABEL_ATTEMPT: str(attempt)}


def build_owner(name: str, uid: str) -> list[dict[str, Any]]:
    """Build the owner reference by which the garbage collector deletes the object together with its run."""
    return [
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": name,
            "uid": uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
