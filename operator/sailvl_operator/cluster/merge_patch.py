"""JSON merge patches (RFC 7396): what to send so that the old document becomes the new one; used for the status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def build_merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Changed fields, with null for those that went; empty when nothing changed. Lists are replaced whole."""
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
    """The same document without null fields: a merge patch would take them for deletions, a schema refuses them."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(inner) for inner in value]
    return value
