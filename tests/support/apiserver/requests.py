"""The verbs of an API server on the objects of a store: one request in, one response out, no waiting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.support.apiserver.merge_patch import apply_merge_patch
from tests.support.apiserver.objects import (
    Object,
    RequestPath,
    matches_fields,
    matches_labels,
    parse_path,
    parse_selector,
)
from tests.support.apiserver.store import ObjectStore

_PRECONDITIONS = ("resourceVersion", "uid")
_SERVER_FIELDS = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "name",
    "namespace",
    "resourceVersion",
    "uid",
)
"""Metadata that no update of a client changes."""
_SUCCESS = {"kind": "Status", "status": "Success"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiResponse:
    """Status, JSON body and headers."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def build_error(code: int, reason: str, **headers: str) -> ApiResponse:
    """Return a Status object as the API server answers with."""
    body = {"kind": "Status", "code": code, "reason": reason, "message": reason}
    return ApiResponse(status=code, body=msgspec.json.encode(body), headers=headers)


class InMemoryApiServer(ObjectStore):
    """A store that answers requests; watches are opened on it by `watches.Watch`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pages: dict[str, tuple[int, list[Object]]] = {}
        """Version and remaining objects of each list that is read in pages, by continue token."""

    def handle(self, method: str, path: str, query: Mapping[str, str], body: Any, *, by: str) -> ApiResponse:
        """Execute one request of a client."""
        target = parse_path(path)
        if not target.name:
            return self._handle_collection(method, target, query, body, by=by)
        found = self.get(target.plural, target.namespace, target.name)
        if found is None:
            return build_error(404, "NotFound")
        if method == "GET":
            return _build_response(found)
        if not _meets_preconditions(found, body or {}):
            return build_error(409, "Conflict")
        if method == "DELETE":
            self.delete(target.plural, found, by=by, grace_seconds=(body or {}).get("gracePeriodSeconds"))
            return _build_response(_SUCCESS)
        change = self._replace if method == "PUT" else self._patch
        return _build_response(change(target, found, body, by=by))

    def _handle_collection(
        self, method: str, target: RequestPath, query: Mapping[str, str], body: Any, *, by: str
    ) -> ApiResponse:
        if method == "GET":
            return self._list_page(target, query)
        if method == "DELETE":
            for found in self._select(target, query):
                self.delete(target.plural, found, by=by, grace_seconds=(body or {}).get("gracePeriodSeconds"))
            return _build_response(_SUCCESS)
        metadata = {"namespace": target.namespace} | body["metadata"]
        if self.get(target.plural, target.namespace, metadata.get("name", "")) is not None:
            return build_error(409, "AlreadyExists")
        return _build_response(self.create(target.plural, body | {"metadata": metadata}, by=by))

    def _replace(self, target: RequestPath, found: Object, body: Object, *, by: str) -> Object:
        def mutate(new: Object) -> None:
            new.clear()
            new.update(body | {"metadata": _keep_server_fields(found, body.get("metadata", {}))})

        return self.update(target.plural, found, mutate, by=by)

    def _patch(self, target: RequestPath, found: Object, patch: Object, *, by: str) -> Object:
        """Apply a merge patch: of the status alone to the subresource, else of everything but the status."""
        is_status = target.subresource == "status"
        change = {key: value for key, value in patch.items() if (key == "status") is is_status}

        def mutate(new: Object) -> None:
            merged = apply_merge_patch(new, change)
            new.clear()
            new.update(merged | {"metadata": _keep_server_fields(found, merged["metadata"])})

        return self.update(target.plural, found, mutate, by=by)

    def _select(self, target: RequestPath, query: Mapping[str, str]) -> list[Object]:
        labels, fields = (parse_selector(query.get(name, "")) for name in ("labelSelector", "fieldSelector"))
        return [
            o
            for o in self.list_objects(target.plural)
            if target.namespace in ("", o["metadata"]["namespace"])
            and matches_labels(labels, o["metadata"].get("labels", {}))
            and matches_fields(o, fields)
        ]

    def _list_page(self, target: RequestPath, query: Mapping[str, str]) -> ApiResponse:
        """Return one page; all pages show the objects of the first, until the history before them is compacted."""
        token, limit = query.get("continue", ""), int(query.get("limit") or 0)
        version, items = self._pages[token] if token else (self.version, self._select(target, query))
        if token and version < self.oldest_version:
            return build_error(410, "Expired")
        metadata = {"resourceVersion": str(version)}
        if limit and len(items) > limit:
            metadata["continue"] = f"{version}-{len(items)}-{target.plural}-{self.version}"
            self._pages[metadata["continue"]] = version, items[limit:]
            items = items[:limit]
        return _build_response({"metadata": metadata, "items": items})


def _meets_preconditions(found: Object, body: Object) -> bool:
    """Compare uid and resourceVersion where a request names them, as preconditions or in the object's metadata."""
    wanted = body.get("preconditions") or body.get("metadata") or {}
    return all(wanted[name] == found["metadata"][name] for name in _PRECONDITIONS if name in wanted)


def _keep_server_fields(found: Object, metadata: Object) -> Object:
    own = {name: value for name, value in metadata.items() if name not in _SERVER_FIELDS}
    return own | {name: found["metadata"][name] for name in _SERVER_FIELDS if name in found["metadata"]}


def _build_response(body: Object) -> ApiResponse:
    return ApiResponse(status=200, body=msgspec.json.encode(body))
