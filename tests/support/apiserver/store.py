"""Objects, their versions and their history, as etcd and the storage layer of an API server keep them.

`requests.py` serves HTTP requests from it and `watches.py` its events. It runs no controllers; tests that want them
register an observer. Nothing in it waits, so it works in real and in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from tests.support.apiserver.objects import Key, Object, copy_object, is_active

Verb = Literal["create", "update", "delete", "remove"]
"""Effect of a write; `delete` only marks a pod that its kubelet removes later."""

NEW_YEAR_2026 = 1_767_225_600.0
"""The time that a store without a clock stamps on new objects."""
_DEFAULT_GRACE_SECONDS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectWrite:
    """One change of one object, as observers receive it."""

    by: str
    """The client."""
    verb: Verb
    plural: str
    before: Object | None
    after: Object | None

    @property
    def object(self) -> Object:
        """The newest state of the object."""
        found = self.after if self.after is not None else self.before
        assert found is not None
        return found

    def __str__(self) -> str:
        metadata = self.object["metadata"]
        return f"{self.by} {self.verb} {self.plural}/{metadata['name']} ({metadata['uid']})"


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchEvent:
    """One event of the history, encoded once for all watches."""

    version: int
    plural: str
    namespace: str
    labels: Mapping[str, str]
    line: bytes


class ObjectStore:
    """Objects by plural and key. A stored object is never changed in place: each version is a new one."""

    def __init__(self, *, clock: Callable[[], float] = lambda: NEW_YEAR_2026, has_kubelets: bool = False) -> None:
        self.clock = clock
        self.has_kubelets = has_kubelets
        """Whether a deleted pod that may still run on a node stays until a kubelet removes it."""
        self.objects: dict[str, dict[Key, Object]] = {}
        self.history: list[WatchEvent] = []
        self.version = 100
        self.oldest_version = 0
        """Versions before this one have been compacted: they can be neither watched nor paged from."""
        self.observers: list[Callable[[ObjectWrite], None]] = []
        self.listeners: list[Callable[[WatchEvent], None]] = []
        self._uids = 0

    def list_objects(self, plural: str) -> list[Object]:
        """Return every object of a kind."""
        return list(self.objects.get(plural, {}).values())

    def list_names(self, plural: str) -> set[str]:
        """Return the names of a kind's objects, in all namespaces."""
        return {o["metadata"]["name"] for o in self.list_objects(plural)}

    def get(self, plural: str, namespace: str, name: str) -> Object | None:
        """Return an object, or None if there is none of that name."""
        return self.objects.get(plural, {}).get((namespace, name))

    def find(self, plural: str, uid: str) -> Object | None:
        """Return the object with a uid, or None if there is none."""
        return next((o for o in self.objects.get(plural, {}).values() if o["metadata"]["uid"] == uid), None)

    def create(self, plural: str, body: Object, *, by: str) -> Object:
        """Store a new object with uid, generation and creation time; its name must be free."""
        metadata = body["metadata"] | {"uid": self._next_uid(plural), "generation": 1}
        metadata["creationTimestamp"] = self.format_time()
        metadata.setdefault("name", f"{metadata.get('generateName', '')}{self._uids}")
        return self._store(plural, body | {"metadata": metadata}, by=by, verb="create", before=None)

    def put(self, plural: str, body: Object, *, by: str = "another client") -> Object:
        """Create or replace an object as given, status and generation included; always makes a new version."""
        metadata = {"namespace": "team"} | body.get("metadata", {})
        before = self.get(plural, metadata["namespace"], metadata["name"])
        uid = self._next_uid(plural) if before is None else before["metadata"]["uid"]
        metadata = {"uid": uid, "generation": 1, "creationTimestamp": self.format_time()} | metadata
        verb: Verb = "create" if before is None else "update"
        return self._store(plural, copy_object(body | {"metadata": metadata}), by=by, verb=verb, before=before)

    def update(self, plural: str, found: Object, mutate: Callable[[Object], None], *, by: str) -> Object:
        """Store a changed copy; a new spec has a new generation. Without a difference nothing is written."""
        new = copy_object(found)
        mutate(new)
        if new == found:
            return found
        if new.get("spec") != found.get("spec"):
            new["metadata"]["generation"] += 1
        return self._store(plural, new, by=by, verb="update", before=found)

    def delete(self, plural: str, found: Object, *, by: str, grace_seconds: int | None = None) -> None:
        """Remove an object at once, but only mark a pod that may still run: its kubelet removes it.

        A second deletion of a marked pod can only shorten its grace period.
        """
        if not self.has_kubelets or plural != "pods" or not is_active(found) or not found["spec"].get("nodeName"):
            self.remove(plural, found, by=by)
            return
        default = found["spec"].get("terminationGracePeriodSeconds", _DEFAULT_GRACE_SECONDS)
        seconds = default if grace_seconds is None else grace_seconds
        known = found["metadata"].get("deletionGracePeriodSeconds")
        if known is not None and known <= seconds:
            return
        new = copy_object(found)
        new["metadata"] |= {"deletionTimestamp": self.format_time(seconds), "deletionGracePeriodSeconds": seconds}
        self._store(plural, new, by=by, verb="delete", before=found)

    def remove(self, plural: str, found: Object, *, by: str = "another client") -> None:
        """Remove an object now, whatever its grace period."""
        metadata = found["metadata"]
        del self.objects[plural][metadata["namespace"], metadata["name"]]
        self.version += 1
        last = found | {"metadata": metadata | {"resourceVersion": str(self.version)}}
        self._publish(plural, "DELETED", last)
        self._notify(ObjectWrite(by=by, verb="remove", plural=plural, before=last, after=None))

    def compact(self) -> None:
        """Drop the history, as etcd's compaction does."""
        self.history.clear()
        self.oldest_version = self.version

    def format_time(self, seconds_from_now: float = 0.0) -> str:
        """Return the store's time, moved by some seconds, in the API's format."""
        return datetime.fromtimestamp(int(self.clock() + seconds_from_now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _next_uid(self, plural: str) -> str:
        self._uids += 1
        return f"{plural[:-1]}-{self._uids}"

    def _store(self, plural: str, body: Object, *, by: str, verb: Verb, before: Object | None) -> Object:
        self.version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self.version)}
        body = body | {"metadata": metadata}
        self.objects.setdefault(plural, {})[metadata["namespace"], metadata["name"]] = body
        self._publish(plural, "ADDED" if before is None else "MODIFIED", body)
        self._notify(ObjectWrite(by=by, verb=verb, plural=plural, before=before, after=body))
        return body

    def _publish(self, plural: str, type_: str, body: Object) -> None:
        metadata = body["metadata"]
        event = WatchEvent(
            version=self.version,
            plural=plural,
            namespace=metadata["namespace"],
            labels=metadata.get("labels", {}),
            line=encode_event(type_, body),
        )
        self.history.append(event)
        _call_all(self.listeners, event)

    def _notify(self, write: ObjectWrite) -> None:
        _call_all(self.observers, write)


def encode_event(type_: str, body: Object) -> bytes:
    """Return a watch event as a line of JSON."""
    return msgspec.json.encode({"type": type_, "object": body}) + b"\n"


def _call_all(receivers: Iterable[Callable[[Any], None]], value: object) -> None:
    for receive in receivers:
        receive(value)
