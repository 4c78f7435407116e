"""An API server for tests, over real HTTP: lists in pages, watches, preconditions, conflicts, injected errors.

It keeps objects and their history, as etcd does; it runs no controllers. Tests look at its objects, not at calls.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from sailvl_operator.api import names

Object = dict[str, Any]


def _describe(plural: str, kind: str) -> dict[str, Any]:
    verbs = ["get", "list", "watch", "patch"]
    return {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}


def _group(name: str, version: str) -> dict[str, Any]:
    served = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [served], "preferredVersion": served}


DISCOVERY: dict[str, Any] = {
    "/version": {"major": "1", "minor": "34"},
    "/api": {"versions": ["v1"]},
    "/api/v1": {"resources": [_describe("namespaces", "Namespace")]},
    "/apis": {"groups": [_group(names.GROUP, names.VERSION), _group("apiextensions.k8s.io", "v1")]},
    "/apis/apiextensions.k8s.io/v1": {
        "resources": [_describe("customresourcedefinitions", "CustomResourceDefinition")]
    },
    f"/apis/{names.API_VERSION}": {"resources": [_describe(names.PLURAL, names.KIND)]},
}
"""What the server serves, as clients ask for it."""


@dataclass(kw_only=True)
class Refusal:
    """Answers instead of the real one."""

    method: str
    path_end: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class Anonymous:
    """A kubernetes Configuration without credentials."""

    username = ""
    ssl_ca_cert = cert_file = key_file = None
    verify_ssl = True

    def __init__(self, host: str) -> None:
        self.host = host

    def auth_settings(self) -> dict[str, Any]:
        """No header."""
        return {}


class FakeApi:
    """One namespace-aware store of every kind, by plural."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[tuple[str, str], Object]] = {}
        self.history: list[tuple[int, str, str, Object]] = []
        self.version = 100
        self.oldest_version = 0
        self.refusals: list[Refusal] = []
        self.requests: list[tuple[str, str, Mapping[str, str], Any]] = []
        self.watch_seconds = 30.0
        self.created = "2026-01-01T00:00:00Z"
        self.open_watches = 0
        self._changed = asyncio.Condition()
        self._uids = 0
        self._epoch = 0

    def all(self, plural: str) -> list[Object]:
        """Every object of a kind."""
        return list(self.objects.get(plural, {}).values())

    def names(self, plural: str) -> set[str]:
        """Their names."""
        return {o["metadata"]["name"] for o in self.all(plural)}

    def writes(self) -> list[tuple[str, str]]:
        """Method and path of every request that changes something."""
        return [(method, path) for method, path, _, _ in self.requests if method != "GET"]

    async def put(self, plural: str, body: Object, *, type_: str = "") -> Object:
        """As another client would: create or replace."""
        metadata = body.setdefault("metadata", {})
        metadata.setdefault("namespace", "team")
        key = metadata["namespace"], metadata["name"]
        known = self.objects.setdefault(plural, {}).get(key)
        self._uids += 1
        metadata.setdefault("uid", known["metadata"]["uid"] if known else f"uid-{self._uids}")
        metadata.setdefault("creationTimestamp", self.created)
        metadata.setdefault("generation", 1)
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        self.objects[plural][key] = body
        await self._tell(plural, type_ or ("MODIFIED" if known else "ADDED"), body)
        return body

    async def remove(self, plural: str, name: str, namespace: str = "team") -> None:
        """As another client would."""
        body = json.loads(json.dumps(self.objects[plural].pop((namespace, name))))
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        await self._tell(plural, "DELETED", body)

    def forget_history(self) -> None:
        """As etcd's compaction: older versions can't be watched from."""
        self.history.clear()
        self.oldest_version = self.version

    async def break_watches(self) -> None:
        """End every open watch now."""
        async with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    async def _tell(self, plural: str, type_: str, body: Object) -> None:
        async with self._changed:
            self.history.append((self.version, plural, type_, json.loads(json.dumps(body))))
            self._changed.notify_all()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Every path."""
        body = json.loads(text) if (text := await request.text()) else None
        self.requests.append((request.method, request.path, dict(request.query), body))
        for refusal in self.refusals:
            if refusal.method == request.method and request.path.endswith(refusal.path_end) and refusal.times:
                refusal.times -= 1
                return _status(refusal.status, "Injected", headers=refusal.headers)
        if request.path in DISCOVERY:
            return web.json_response(DISCOVERY[request.path])
        namespace, plural, name, subresource = _split(request.path)
        if name:
            return await self._handle_one(request.method, plural, (namespace, name), body, subresource=subresource)
        return await self._handle_many(request, plural, namespace, body)

    async def _handle_many(self, request: web.Request, plural: str, namespace: str, body: Any) -> web.StreamResponse:
        if request.method == "POST":
            return await self._create(plural, namespace, body)
        if request.method == "DELETE":
            return await self._delete_collection(plural, namespace, request.query)
        if request.query.get("watch"):
            return await self._watch(request, plural, namespace)
        return self._list(plural, namespace, request.query)

    async def _handle_one(
        self, method: str, plural: str, key: tuple[str, str], body: Any, *, subresource: str
    ) -> web.Response:
        found = self.objects.get(plural, {}).get(key)
        if found is None:
            return _status(404, "NotFound")
        if method == "GET":
            return web.json_response(found)
        return await self._change(method, plural, found, body, subresource=subresource)

    async def _create(self, plural: str, namespace: str, body: Object) -> web.Response:
        metadata = body["metadata"]
        self._uids += 1
        name = metadata.setdefault("name", f"{metadata.get('generateName', '')}{self._uids}")
        if (namespace, name) in self.objects.get(plural, {}):
            return _status(409, "AlreadyExists")
        return web.json_response(await self.put(plural, body | {"metadata": metadata | {"namespace": namespace}}))

    def _list(self, plural: str, namespace: str, query: Mapping[str, str]) -> web.Response:
        items = [
            o
            for o in self.all(plural)
            if _matches(o, namespace, query.get("labelSelector", "")) and _has_fields(o, query.get("fieldSelector", ""))
        ]
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 0)
        end = start + limit if limit else len(items)
        metadata = {"resourceVersion": str(self.version)}
        if end < len(items):
            metadata["continue"] = str(end)
        return web.json_response({"metadata": metadata, "items": items[start:end]})

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        seen = int(request.query.get("resourceVersion") or 0)
        response = web.StreamResponse()
        await response.prepare(request)
        if seen < self.oldest_version:
            await _send(response, "ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
            return response
        epoch = self._epoch
        self.open_watches += 1
        until = asyncio.get_running_loop().time() + min(
            self.watch_seconds, float(request.query.get("timeoutSeconds", 300))
        )
        while epoch == self._epoch and asyncio.get_running_loop().time() < until:
            start, seen = seen, max(seen, self.version)
            for version, kind, type_, body in list(self.history):
                if (
                    start < version <= seen
                    and kind == plural
                    and _matches(body, namespace, request.query.get("labelSelector", ""))
                ):
                    await _send(response, type_, body)
            async with self._changed:
                try:
                    async with asyncio.timeout(until - asyncio.get_running_loop().time()):
                        await self._changed.wait_for(lambda: self.version > seen or epoch != self._epoch)  # noqa: B023
                except TimeoutError:
                    break
        self.open_watches -= 1
        await _send(response, "BOOKMARK", _build_bookmark(plural, str(seen)))
        return response

    async def _change(
        self, method: str, plural: str, found: Object, body: Object | None, *, subresource: str
    ) -> web.Response:
        wanted = (body or {}).get("preconditions") or (body or {}).get("metadata") or {}
        for guard in ("uid", "resourceVersion"):
            if guard in wanted and wanted[guard] != found["metadata"][guard]:
                return _status(409, "Conflict")
        if method == "DELETE":
            await self.remove(plural, found["metadata"]["name"], found["metadata"]["namespace"])
            return web.json_response({"kind": "Status", "status": "Success"})
        new = body or {}
        if method == "PATCH":
            change = {"status": new.get("status", {})} if subresource == "status" else new
            new = _merge(found, change)
        kept = ("uid", "namespace", "name", "generation", "creationTimestamp")
        given = found["metadata"] if subresource else new.get("metadata", {})
        new["metadata"] = given | {name: found["metadata"][name] for name in kept}
        return web.json_response(await self.put(plural, json.loads(json.dumps(new))))

    async def _delete_collection(self, plural: str, namespace: str, query: Mapping[str, str]) -> web.Response:
        for found in [o for o in self.all(plural) if _matches(o, namespace, query.get("labelSelector", ""))]:
            await self.remove(plural, found["metadata"]["name"], namespace)
        return web.json_response({"kind": "Status", "status": "Success"})


@asynccontextmanager
async def serve(api: FakeApi) -> AsyncIterator[str]:
    """Its URL, while it runs."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("/")).rstrip("/")
    finally:
        await api.break_watches()
        await server.close()


def _split(path: str) -> tuple[str, str, str, str]:
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    plural, name, subresource = [*parts, "", ""][:3]
    return namespace, plural, name, subresource


def _matches(body: Object, namespace: str, selector: str) -> bool:
    metadata = body["metadata"]
    labels = metadata.get("labels", {})
    pairs = [term.split("=") for term in selector.split(",") if term]
    return namespace in ("", metadata["namespace"]) and all(labels.get(name) == value for name, value in pairs)


def _has_fields(body: Object, selector: str) -> bool:
    pairs = [term.split("=") for term in selector.split(",") if term]
    return all(_look_up(body, path.split(".")) == value for path, value in pairs)


def _look_up(body: Any, path: list[str]) -> Any:
    for part in path:
        body = body.get(part, {})
    return body


def _merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _status(code: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "code": code, "reason": reason, "message": reason}
    return web.json_response(body, status=code, headers=headers)


async def _send(response: web.StreamResponse, type_: str, body: Object) -> None:
    await response.write(json.dumps({"type": type_, "object": body}).encode() + b"\n")


def _build_bookmark(plural: str, version: str) -> Object:
    """An empty object, as the API server sends it: with nulls where others have times and lists."""
    pod = {"metadata": {"creationTimestamp": None}, "spec": {"containers": None}}
    inside: Object = {"pods": {"spec": pod["spec"]}, "jobs": {"spec": {"template": pod}}}.get(plural, {})
    return inside | {"metadata": {"resourceVersion": version, "creationTimestamp": None}, "status": {}}
