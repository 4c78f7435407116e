"""Build the Indexed Job of an attempt.

One write creates a whole attempt, because the pods carry the stage config as an annotation. `backoffLimitPerIndex: 0`
keeps failed pods as evidence of the cause (`backoffLimit: 0` deletes them within seconds). `podReplacementPolicy:
Failed` keeps the pods of a resumed Job from running beside pods that still terminate.
"""

from __future__ import annotations

from typing import Any

from torchx.specs import AppDef

from sailvl_operator.api import names
from sailvl_operator.core.decision import AttemptSpec
from sailvl_operator.core.desired.metadata import build_attempt_labels, build_owner
from sailvl_operator.core.desired.pod import build_pod_spec
from sailvl_operator.core.desired.workload import encode_document


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
