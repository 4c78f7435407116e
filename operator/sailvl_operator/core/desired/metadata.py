"""Build the labels and owner references of the objects that a run owns."""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names


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
