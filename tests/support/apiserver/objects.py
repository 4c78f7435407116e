"""Kubernetes objects as dicts: copies, owners, selectors and the paths of requests, shared by store and controllers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPath:
    """The parts of a request's path; a part that the path does not have is empty."""

    namespace: str
    plural: str
    name: str
    subresource: str


def parse_path(path: str) -> RequestPath:
    """Split the path of a request below `/api/v1` or `/apis/GROUP/VERSION`."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    plural, name, subresource = [*parts, "", ""][:3]
    return RequestPath(namespace=namespace, plural=plural, name=name, subresource=subresource)


def copy_object(body: Object) -> Object:
    """Return a deep copy."""
    copied: Object = msgspec.json.decode(msgspec.json.encode(body))
    return copied


def get_owner_uid(body: Object) -> str:
    """Return the uid of an object's controller, or an empty string if it has none."""
    return next((o["uid"] for o in body["metadata"].get("ownerReferences", []) if o.get("controller")), "")


def is_active(pod: Object) -> bool:
    """Return whether a pod's containers may still run."""
    return pod["status"]["phase"] not in ("Succeeded", "Failed")


def parse_selector(text: str) -> dict[str, str]:
    """Return the wanted values of a label or field selector; only `key=value` terms are supported."""
    pairs = (term.partition("=") for term in text.split(",") if term)
    return {name: value for name, _, value in pairs}


def matches_labels(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether labels have all wanted values."""
    return wanted.items() <= labels.items()


def matches_fields(body: Object, wanted: Mapping[str, str]) -> bool:
    """Return whether an object has the wanted values at their dotted paths."""
    return all(_read_field(body, path) == value for path, value in wanted.items())


def _read_field(body: Any, path: str) -> Any:
    for part in path.split("."):
        body = body.get(part, {})
    return body
