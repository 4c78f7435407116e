"""Informer of one kind: lists and watches its objects and keeps them as typed records, indexed by run.

`owned_objects.py` runs one for each kind of owned object; the controller reads the records. The last
state of a deleted Job or pod is kept, marked as gone, until the controller forgets it: it is the evidence of how an
attempt ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec.structs import replace

from sailvl_operator.api import names
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.resources import ObjectType, Resource
from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.cluster.watch_stream import EventType, Object
from sailvl_operator.core.observe import JobRecord, NetworkPolicyRecord, PodRecord, ServiceRecord
from sailvl_operator.errors import ApiError, Gone

log = logging.getLogger(__name__)

AnyRecord = JobRecord | PodRecord | ServiceRecord | NetworkPolicyRecord
Record = TypeVar("Record", bound=AnyRecord)
Mortal = TypeVar("Mortal", JobRecord, PodRecord)

_BACKOFF_LIMIT_SECONDS = 10.0
"""Longest average wait before a broken watch is resumed: how late changes are seen after an outage."""
_DELETED_UIDS_LIMIT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[Record]):
    """Resource that an informer watches, and how its objects become records."""

    resource: Resource
    decode_as: ObjectType
    """Type to decode objects to; other fields are skipped."""
    parse: Callable[[dict[str, Any]], Record]
    mark_gone: Callable[[Record], Record] | None = None
    """Function that marks the last state of a deleted object. None, the default, removes the record at once."""
    stamp: Callable[[Record, Record | None, float], Record] = lambda record, _known, _now: record
    """Function that adds times to a new record, given the record before and the time now in Unix seconds."""
    is_routine: Callable[[Record], bool] = lambda _: False
    """Whether the record needs no action, only a status update. Default: never."""


class Store(Generic[Record]):
    """Records by run and UID. Each change is reported with the run's key: to `on_routine_change` if it needs no action,
    else to `on_change`.

    `retains_deleted`: whether the last state of a deleted object is kept until `forget`.
    """

    def __init__(
        self,
        kind: Kind[Record],
        on_change: Callable[[RunKey], None],
        clock: Callable[[], float] = time.time,
        *,
        on_routine_change: Callable[[RunKey], None] | None = None,
    ) -> None:
        self._kind = kind
        self._on_change = on_change
        self._on_routine_change = on_routine_change or on_change
        self._clock = clock
        self._by_key: dict[RunKey, dict[str, Record]] = {}
        self._keys: dict[str, RunKey] = {}  # by UID; a client may change the label that names the run
        self.retains_deleted = False
        self._deleted_uids: dict[str, None] = {}  # oldest first; the response to our POST may come after the deletion

    def get(self, key: RunKey) -> list[Record]:
        """Return all records of a run, those of deleted objects included."""
        return list(self._by_key.get(key, {}).values())

    def __iter__(self) -> Iterator[Record]:
        for records in self._by_key.values():
            yield from records.values()

    def put(self, raw: Object) -> None:
        """Store a new or changed object, from the watch or from the response to our own write. Skip deleted ones."""
        record = self._kind.parse(raw)
        if record.uid not in self._deleted_uids:
            self._store(record)

    def put_watched(self, raw: Object) -> None:
        """Store an object that the watch reports. It exists, even if it was removed before because it lost its labels
        for a while."""
        self._deleted_uids.pop(raw["metadata"]["uid"], None)
        self.put(raw)

    def put_created(self, raw: Object) -> None:
        """Store the response to our own POST, unless the watch has already reported the object: its state is newer."""
        record = self._kind.parse(raw)
        if record.uid not in self._by_key.get(_run_key(record), {}):
            self.put(raw)

    def delete(self, raw: Object) -> None:
        """Handle a deletion; `raw` is the object's last state."""
        self._remove(self._kind.parse(raw))

    def uids(self, namespace: str) -> set[str]:
        """Return the UIDs of all records of a namespace; of all namespaces if it is empty."""
        return {record.uid for record in self._records_in(namespace)}

    def replace_all(self, records: Iterable[Record], *, namespace: str, known: Set[str]) -> None:
        """Store the result of a list of a namespace, or of all if it is empty. Records that are missing from the list
        were deleted while the watch was down.

        `known`: UIDs in the store when the list request was sent. Objects that we created after that may be missing
        from the list and are kept.
        """
        found = {record.uid: record for record in records}
        for record in [r for r in self._records_in(namespace) if r.uid in known and r.uid not in found]:
            self._remove(record)
        for record in found.values():
            self._store(record)

    def forget(self, key: RunKey, is_closed: Callable[[Record], bool]) -> None:
        """Remove the records of deleted objects for which `is_closed` holds, once their evidence has been used."""
        records = self._by_key.get(key, {})
        for uid in [u for u, r in records.items() if _is_gone(r) and is_closed(r)]:
            del records[uid]
            self._forget_key(uid, key)
        if not records:
            self._by_key.pop(key, None)

    def _store(self, record: Record) -> None:
        key = _run_key(record)
        known_key = self._keys.setdefault(record.uid, key)
        if known_key != key:
            self._move(record.uid, known_key, key)
        records = self._by_key.setdefault(key, {})
        known = records.get(record.uid)
        if known is not None and _is_gone(known):
            return  # the response to our own write may come after the deletion
        record = self._kind.stamp(record, known, self._clock())
        if known != record:
            records[record.uid] = record
            report = self._on_routine_change if self._kind.is_routine(record) else self._on_change
            report(key)

    def _records_in(self, namespace: str) -> list[Record]:
        return [r for key, rs in self._by_key.items() if namespace in ("", key[0]) for r in rs.values()]

    def _move(self, uid: str, old: RunKey, new: RunKey) -> None:
        """Handle a changed label: for the run that it named, the object is deleted."""
        self._keys[uid] = new
        known = self._by_key.get(old, {}).get(uid)
        if known is not None:
            self._retire(known, old)

    def _remove(self, record: Record) -> None:
        key = _run_key(record)
        if self._retire(record, key):
            self._forget_key(record.uid, key)
            self._remember_deleted(record.uid)

    def _retire(self, record: Record, key: RunKey) -> bool:
        """Mark the record as gone if it is retained, else remove it. Return whether it was removed."""
        records = self._by_key.setdefault(key, {})
        known = records.get(record.uid)
        if known is not None and _is_gone(known):
            return False
        mark_gone = self._kind.mark_gone if self.retains_deleted else None
        if mark_gone is not None:
            records[record.uid] = self._kind.stamp(mark_gone(record), known, self._clock())
        else:
            records.pop(record.uid, None)
        if not records:
            del self._by_key[key]
        self._on_change(key)
        return mark_gone is None

    def _forget_key(self, uid: str, key: RunKey) -> None:
        if self._keys.get(uid) == key:
            del self._keys[uid]

    def _remember_deleted(self, uid: str) -> None:
        self._deleted_uids[uid] = None
        if len(self._deleted_uids) > _DELETED_UIDS_LIMIT:
            del self._deleted_uids[next(iter(self._deleted_uids))]


class Informer(Generic[Record]):
    """Keeps a store up to date while `run` runs.

    `namespace`: the namespace to watch; empty: all. `count_restart`: called with resource and cause of each restart.
    `count_error`: called for each object that can't be parsed; the others are not affected.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind[Record],
        store: Store[Record],
        *,
        namespace: str = "",
        count_restart: Callable[[str, str], None],
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._kind = kind
        self._store = store
        self._namespace = namespace
        self._count_restart = count_restart
        self._count_error = count_error
        self._last_received_at = time.monotonic()
        self._version = ""
        self._failures = 0
        self.synced = asyncio.Event()
        self.resource = kind.resource.plural

    def silent_seconds(self) -> float:
        """Return the seconds since the last data of the list or the watch, bookmarks included."""
        return time.monotonic() - self._last_received_at

    async def run(self) -> None:
        """List, then watch; resume the watch when it ends, and list again when its resourceVersion has expired. Return
        only on cancellation."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                self._count_restart(self.resource, "timeout")
            except Gone:
                self._version = ""
                self._failures += 1
                self._count_restart(self.resource, "expired")
            except ApiError as error:
                self._failures += 1
                self._count_restart(self.resource, "error")
                log.warning("watch of %s failed, resuming: %s", self.resource, error)
            backoff = min(0.1 * 2.0 ** min(self._failures, 10), _BACKOFF_LIMIT_SECONDS)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))

    async def _list(self) -> None:
        records: list[Record] = []
        version, known = "", self._store.uids(self._namespace)
        pages = self._client.list_pages(
            self._kind.resource, self._namespace, selector=names.MANAGED_SELECTOR, decode_as=self._kind.decode_as
        )
        async for items, version in pages:  # noqa: B007  # the last page's is used
            self._last_received_at = time.monotonic()
            for raw in items:
                known.discard(raw["metadata"]["uid"])  # keeps the last record of an object that can't be parsed
                with self._contain_errors(raw):
                    records.append(self._kind.parse(raw))
        self._store.replace_all(records, namespace=self._namespace, known=known)
        self._version = version
        self.synced.set()

    async def _watch(self) -> None:
        events = self._client.watch(
            self._kind.resource,
            self._namespace,
            selector=names.MANAGED_SELECTOR,
            resource_version=self._version,
            decode_as=self._kind.decode_as,
        )
        async for type_, raw in events:
            self._last_received_at = time.monotonic()
            self._version = raw["metadata"]["resourceVersion"]
            self._failures = 0
            with self._contain_errors(raw):
                self._handle(type_, raw)

    def _contain_errors(self, raw: Object) -> AbstractContextManager[None]:
        subject = f"{self.resource} {raw['metadata'].get('namespace', '')}/{raw['metadata'].get('name', '')}"
        return contain_errors(f"informer-{self.resource}", self._count_error, subject=subject)

    def _handle(self, type_: EventType, raw: Object) -> None:
        if type_ == "DELETED":
            self._store.delete(raw)
        elif type_ != "BOOKMARK":
            self._store.put_watched(raw)


def mark_gone(record: Mortal) -> Mortal:
    """Return the last state of a deleted Job or pod, marked as gone."""
    return replace(record, is_gone=True)


def _run_key(record: AnyRecord) -> RunKey:
    return record.namespace, record.run


def _is_gone(record: AnyRecord) -> bool:
    return isinstance(record, JobRecord | PodRecord) and record.is_gone
