"""JSON merge patches (RFC 7396), used to write the status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def build_merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Build the patch that turns `old` into `new`: changed fields, and null for removed ones. Lists are replaced as a
    whole. The patch is empty if nothing changed."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = build_merge_patch(before, value)
            if inner:
                patch[key] = inner
        elif key not in old or before != value:
            patch[key] = value
    return patch


def drop_nulls(value: Any) -> Any:
    """Copy a document without null fields, since a merge patch treats them as deletions and a schema rejects them."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(inner) for inner in value]
    return value
