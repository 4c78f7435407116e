"""An API server in memory: objects and their versions, preconditions, pages, watches, graceful deletion.

`model_wire.py` lies between it and the operator's client, `model_cluster.py` adds the controllers; all in virtual time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec

Object = dict[str, Any]
Key = tuple[str, str]
"""namespace, name"""

SILENCE = 150.0
"""Seconds without a byte after which aiohttp gives a watch up, as the client asks it to."""
_CONFLICTS = {"uid", "resourceVersion"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """One change of one object, as those who look on see it."""

    by: str
    verb: str
    """create, update, delete (it goes, perhaps later) or remove (it is gone)."""
    plural: str
    before: Object | None
    after: Object | None

    @property
    def object(self) -> Object:
        """Its newest state."""
        found = self.after if self.after is not None else self.before
        assert found is not None
        return found

    def __str__(self) -> str:
        metadata = self.object["metadata"]
        return f"{self.by} {self.verb} {self.plural}/{metadata['name']} ({metadata['uid']})"


@dataclass(kw_only=True)
class Line:
    """A watch event, as bytes."""

    version: int
    plural: str
    labels: Mapping[str, str]
    data: bytes


@dataclass(kw_only=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class ModelApi:
    """Objects by plural and key. Values are never changed in place: each version is a new one."""

    def __init__(self, *, clock: Callable[[], float], rng: random.Random) -> None:
        self.clock, self.rng = clock, rng
        self.objects: dict[str, dict[Key, Object]] = {}
        self.lines: list[Line] = []
        self.version = 100
        self.oldest_version = 0
        self.observers: list[Callable[[Write], None]] = []
        self.watches: list[Watch] = []
        self._uids = 0
        self._snapshots: dict[str, tuple[int, list[Object]]] = {}

    def all(self, plural: str) -> list[Object]:
        return list(self.objects.get(plural, {}).values())

    def get(self, plural: str, namespace: str, name: str) -> Object | None:
        return self.objects.get(plural, {}).get((namespace, name))

    def find(self, plural: str, uid: str) -> Object | None:
        return next((o for o in self.objects.get(plural, {}).values() if o["metadata"]["uid"] == uid), None)

    def forget_history(self) -> None:
        """As etcd's compaction: older versions can't be watched or paged from."""
        self.lines.clear()
        self.oldest_version = self.version

    def create(self, plural: str, body: Object, *, by: str) -> Object:
        """The name must be free."""
        self._uids += 1
        metadata = dict(body["metadata"])
        metadata.setdefault("name", f"{metadata.get('generateName', '')}{self._uids}")
        metadata |= {"uid": f"{plural[:-1]}-{self._uids}", "generation": 1, "creationTimestamp": self.stamp()}
        return self._store(plural, body | {"metadata": metadata}, by=by, verb="create", before=None)

    def change(self, plural: str, found: Object, mutate: Callable[[Object], None], *, by: str) -> Object:
        """A new version, unless nothing is different."""
        new = copy_of(found)
        mutate(new)
        if new == found:
            return found
        if new.get("spec") != found.get("spec"):
            new["metadata"]["generation"] += 1
        return self._store(plural, new, by=by, verb="update", before=found)

    def delete(self, plural: str, found: Object, *, by: str, grace: int | None = None) -> None:
        """Gone at once, but for pods that may still run: their kubelet has the last word."""
        if plural != "pods" or not may_run(found) or not found["spec"].get("nodeName"):
            self.remove(plural, found, by=by)
            return
        asked = found["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
        known = found["metadata"].get("deletionGracePeriodSeconds")
        if known is not None and known <= asked:
            return
        new = copy_of(found)
        new["metadata"] |= {"deletionTimestamp": self.stamp(asked), "deletionGracePeriodSeconds": asked}
        self._store(plural, new, by=by, verb="delete", before=found)

    def remove(self, plural: str, found: Object, *, by: str) -> None:
        metadata = found["metadata"]
        del self.objects[plural][metadata["namespace"], metadata["name"]]
        self.version += 1
        last = found | {"metadata": metadata | {"resourceVersion": str(self.version)}}
        self._publish(plural, "DELETED", last)
        self._tell(Write(by=by, verb="remove", plural=plural, before=last, after=None))

    def stamp(self, later: float = 0.0) -> str:
        return datetime.fromtimestamp(int(self.clock() + later), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _store(self, plural: str, body: Object, *, by: str, verb: str, before: Object | None) -> Object:
        self.version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self.version)}
        body = body | {"metadata": metadata}
        self.objects.setdefault(plural, {})[metadata["namespace"], metadata["name"]] = body
        self._publish(plural, "ADDED" if before is None else "MODIFIED", body)
        self._tell(Write(by=by, verb=verb, plural=plural, before=before, after=body))
        return body

    def _publish(self, plural: str, type_: str, body: Object) -> None:
        data = msgspec.json.encode({"type": type_, "object": body}) + b"\n"
        line = Line(version=self.version, plural=plural, labels=body["metadata"].get("labels", {}), data=data)
        self.lines.append(line)
        for watch in self.watches:
            watch.offer(line)

    def _tell(self, write: Write) -> None:
        for observer in self.observers:
            observer(write)

    # What requests ask for.

    def handle(self, method: str, path: str, query: Mapping[str, str], body: Any, *, by: str) -> Answer:
        """One request, done."""
        namespace, plural, name, subresource = split_path(path)
        if not name:
            return self._handle_many(method, plural, namespace, query, body, by=by)
        found = self.get(plural, namespace, name)
        if found is None:
            return refuse(404, "NotFound")
        if method == "GET":
            return _answer(found)
        guards = (body or {}).get("preconditions") or (body or {}).get("metadata") or {}
        if any(guards[g] != found["metadata"][g] for g in sorted(_CONFLICTS & guards.keys())):
            return refuse(409, "Conflict")
        if method == "DELETE":
            self.delete(plural, found, by=by, grace=(body or {}).get("gracePeriodSeconds"))
            return _answer({"kind": "Status", "status": "Success"})
        return _answer(self._patch(plural, found, body, subresource, by=by))

    def _patch(self, plural: str, found: Object, body: Object, subresource: str, *, by: str) -> Object:
        parts = ("status",) if subresource else ("spec",)

        def mutate(new: Object) -> None:
            for part in parts:
                new[part] = merge(new.get(part), body.get(part, {}))
            metadata = {} if subresource else body.get("metadata") or {}
            for part in metadata.keys() & {"annotations", "labels"}:
                new["metadata"][part] = merge(new["metadata"].get(part), metadata[part])

        return self.change(plural, found, mutate, by=by)

    def _handle_many(
        self, method: str, plural: str, namespace: str, query: Mapping[str, str], body: Any, *, by: str
    ) -> Answer:
        if method == "GET":
            return self._list(plural, namespace, query)
        if method == "DELETE":
            for found in self._select(plural, namespace, query):
                self.delete(plural, found, by=by, grace=body.get("gracePeriodSeconds"))
            return _answer({"kind": "Status", "status": "Success"})
        if self.get(plural, namespace, body["metadata"].get("name", "")) is not None:
            return refuse(409, "AlreadyExists")
        return _answer(self.create(plural, body, by=by))

    def _select(self, plural: str, namespace: str, query: Mapping[str, str]) -> list[Object]:
        wanted, fields = parse_selector(query.get("labelSelector", "")), parse_selector(query.get("fieldSelector", ""))
        return [
            o
            for o in self.all(plural)
            if namespace in ("", o["metadata"]["namespace"])
            and wanted.items() <= o["metadata"].get("labels", {}).items()
            and all(_field(o, path) == value for path, value in fields.items())
        ]

    def _list(self, plural: str, namespace: str, query: Mapping[str, str]) -> Answer:
        """Pages of one snapshot, until the history before it is forgotten."""
        token, limit = query.get("continue", ""), int(query.get("limit") or 0)
        version, items = self._snapshots[token] if token else (self.version, self._select(plural, namespace, query))
        if version < self.oldest_version and token:
            return refuse(410, "Expired")
        metadata = {"resourceVersion": str(version)}
        if limit and len(items) > limit:
            metadata["continue"] = f"{version}-{len(items)}-{plural}-{self.version}"
            self._snapshots[metadata["continue"]] = version, items[limit:]
            items = items[:limit]
        return _answer({"metadata": metadata, "items": items})


class Watch:
    """One open watch: lines come in order, late by whatever its owner says."""

    def __init__(self, api: ModelApi, plural: str, query: Mapping[str, str], lag: Callable[[], float]) -> None:
        self._api, self._plural, self._lag = api, plural, lag
        self._wanted = parse_selector(query.get("labelSelector", ""))
        self._since = int(query["resourceVersion"])
        self._end = _now() + float(query.get("timeoutSeconds", 300))
        self._pending: list[tuple[float, bytes]] = []
        self._news = asyncio.Event()
        self.is_cut = self.is_hanging = False
        self.status = 200

    async def __aenter__(self) -> Watch:
        await asyncio.sleep(self._api.rng.uniform(0.001, 0.01))
        self._api.watches.append(self)
        if self._since < self._api.oldest_version:
            error = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            self._pending.append((0.0, msgspec.json.encode({"type": "ERROR", "object": error}) + b"\n"))
        for line in self._api.lines:
            self.offer(line)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._api.watches.remove(self)

    @property
    def content(self) -> Watch:
        return self

    def offer(self, line: Line) -> None:
        """A line that may be for this watch."""
        if (
            line.version <= self._since
            or line.plural != self._plural
            or not self._wanted.items() <= line.labels.items()
        ):
            return
        earliest = self._pending[-1][0] if self._pending else 0.0
        self._pending.append((max(earliest, _now() + self._lag()), line.data))
        self._news.set()

    def cut(self) -> None:
        """The connection breaks; what was on its way is lost."""
        self.is_cut = True
        self._news.set()

    async def iter_any(self) -> AsyncIterator[bytes]:
        while True:
            until = self._pending[0][0] if self._pending else self._end
            self._news.clear()
            if until > _now():
                await self._wait(until)
            if self.is_cut:
                raise aiohttp.ClientPayloadError("the connection was cut")
            if self._pending and self._pending[0][0] <= _now():
                yield self._pending.pop(0)[1]
            elif not self._pending and _now() >= self._end:
                return

    async def _wait(self, until: float) -> None:
        if self.is_hanging:
            await asyncio.sleep(SILENCE)
            raise TimeoutError("no byte for too long")
        try:
            async with asyncio.timeout_at(until):
                await self._news.wait()
        except TimeoutError:
            return


def may_run(pod: Object) -> bool:
    """Whether its containers may still do anything."""
    return pod["status"]["phase"] not in ("Succeeded", "Failed")


def owner_of(body: Object) -> str:
    """uid of its controller; empty: none."""
    return next((o["uid"] for o in body["metadata"].get("ownerReferences", []) if o.get("controller")), "")


def copy_of(body: Object) -> Object:
    copied: Object = msgspec.json.decode(msgspec.json.encode(body))
    return copied


def parse_selector(text: str) -> dict[str, str]:
    pairs = (term.partition("=") for term in text.split(",") if term)
    return {name: value for name, _, value in pairs}


def _field(body: Any, path: str) -> Any:
    for part in path.split("."):
        body = body.get(part, {})
    return body


def split_path(path: str) -> tuple[str, str, str, str]:
    """Namespace, plural, name and subresource of a URL's path."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    plural, name, subresource = [*parts, "", ""][:3]
    return namespace, plural, name, subresource


def merge(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def refuse(code: int, reason: str, **headers: str) -> Answer:
    body = {"kind": "Status", "code": code, "reason": reason, "message": reason}
    return Answer(status=code, body=msgspec.json.encode(body), headers=headers)


def _answer(body: Object) -> Answer:
    return Answer(status=200, body=msgspec.json.encode(body))


def _now() -> float:
    return asyncio.get_running_loop().time()
