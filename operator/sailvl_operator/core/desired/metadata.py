"""Labels and owner references that every child of a run carries."""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names


def build_labels(run: str) -> dict[str, str]:
    """Of every child of a run."""
    return {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: run}


def build_attempt_labels(run: str, stage: str, attempt: int) -> dict[str, str]:
    """Of a Job and its pods."""
    return build_labels(run) | {names.LABEL_STAGE: stage, names.LABEL_ATTEMPT: str(attempt)}


def build_owner(name: str, uid: str) -> list[dict[str, Any]]:
    """The run owns its children: they go with it."""
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
