"""Build the PersistentVolumeClaim of a run whose spec has a claim template."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.core.desired.metadata import build_labels, build_owner


def build_claim(run: Run) -> dict[str, Any] | None:
    """Build the claim; None if the run names an existing one.

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
