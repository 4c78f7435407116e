"""A list and a watch of one kind, trimmed at once to typed records that are indexed by run.

`children.py` runs one for Jobs and one for pods; the engine reads the records. A deleted Job's or
pod's last state stays, marked gone, until the engine forgets it: it is the evidence of how an attempt ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec.structs import replace

from sailvl_operator.api import names
from sailvl_operator.cluster.client import Client, EventType, Object
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.cluster.wire import Shape
from sailvl_operator.core.observe import JobRecord, PodRecord, ServiceRecord
from sailvl_operator.errors import ApiError, Gone

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=JobRecord | PodRecord | ServiceRecord)
Mortal = TypeVar("Mortal", JobRecord, PodRecord)
Key = tuple[str, str]
"""namespace, run"""

_BACKOFF_LIMIT = 10.0
"""Seconds: after an outage nothing is seen for longer than that, on average."""
_DELETED_REMEMBERED = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[Record]):
    """What an informer watches and how it trims it."""

    resource: Resource
    shape: Shape
    """What of it is decoded."""
    parse: Callable[[dict[str, Any]], Record]
    mark_gone: Callable[[Record], Record] | None = None
    """How the last state of a deleted object is kept; None: it isn't."""
    stamp: Callable[[Record, Record | None, float], Record] = lambda record, _known, _now: record
    """What its earlier state and the time now (Unix seconds) add to a record."""
    is_calm: Callable[[Record], bool] = lambda _: False
    """Whether nothing has to be done about its new state, but to tell of it."""


class Store(Generic[Record]):
    """Records by run and uid. Every change reports its key; to `on_calm` where nothing has to be done about it.

    `keeps_gone`: the last state of what was deleted is kept until somebody forgets it.
    """

    def __init__(
        self,
        kind: Kind[Record],
        on_change: Callable[[Key], None],
        clock: Callable[[], float] = time.time,
        *,
        on_calm: Callable[[Key], None] | None = None,
    ) -> None:
        self._kind = kind
        self._on_change = on_change
        self._on_calm = on_calm or on_change
        self._clock = clock
        self._by_key: dict[Key, dict[str, Record]] = {}
        self.keeps_gone = False
        self._deleted: dict[str, None] = {}  # uids, oldest first: an answer to our own POST may come after the deletion

    def get(self, key: Key) -> list[Record]:
        """All records of a run, gone ones included."""
        return list(self._by_key.get(key, {}).values())

    def __iter__(self) -> Iterator[Record]:
        for records in self._by_key.values():
            yield from records.values()

    def put(self, raw: Object) -> None:
        """A new or changed object, from the watch or from the answer to our own write."""
        record = self._kind.parse(raw)
        if record.uid not in self._deleted:
            self._keep(record)

    def put_created(self, raw: Object) -> None:
        """The answer to our own POST: what the watch says of the object is newer."""
        record = self._kind.parse(raw)
        if record.uid not in self._by_key.get(_key(record), {}):
            self.put(raw)

    def delete(self, raw: Object) -> None:
        """A deletion, with the object's last state."""
        self._remove(self._kind.parse(raw))

    def uids(self, within: str) -> set[str]:
        """Of all records of a namespace (empty: of all)."""
        return {record.uid for record in self._all(within)}

    def replace_all(self, records: Iterable[Record], *, within: str, known: Set[str]) -> None:
        """The result of a list: what it lacks of the namespace (empty: of all) was deleted while nobody watched.

        `known`: the uids when the list was asked for. What came since, by our own POST, needn't be in it.
        """
        found = {record.uid: record for record in records}
        for record in [r for r in self._all(within) if r.uid in known and r.uid not in found]:
            self._remove(record)
        for record in found.values():
            self._keep(record)

    def forget(self, key: Key, is_closed: Callable[[Record], bool]) -> None:
        """Drop the gone records whose evidence has been used."""
        records = self._by_key.get(key, {})
        for uid in [u for u, r in records.items() if _is_gone(r) and is_closed(r)]:
            del records[uid]
        if not records:
            self._by_key.pop(key, None)

    def _keep(self, record: Record) -> None:
        records = self._by_key.setdefault(_key(record), {})
        known = records.get(record.uid)
        if known is not None and _is_gone(known):
            return  # an answer to our own write may come after the deletion
        record = self._kind.stamp(record, known, self._clock())
        if known != record:
            records[record.uid] = record
            tell = self._on_calm if self._kind.is_calm(record) else self._on_change
            tell(_key(record))

    def _all(self, within: str) -> list[Record]:
        return [r for key, rs in self._by_key.items() if within in ("", key[0]) for r in rs.values()]

    def _remove(self, record: Record) -> None:
        key = _key(record)
        records = self._by_key.setdefault(key, {})
        known = records.get(record.uid)
        if known is not None and _is_gone(known):
            return
        if self._kind.mark_gone is not None and self.keeps_gone:
            records[record.uid] = self._kind.stamp(self._kind.mark_gone(record), known, self._clock())
        else:
            records.pop(record.uid, None)
            self._remember_deleted(record.uid)
        if not records:
            del self._by_key[key]
        self._on_change(key)

    def _remember_deleted(self, uid: str) -> None:
        self._deleted[uid] = None
        if len(self._deleted) > _DELETED_REMEMBERED:
            del self._deleted[next(iter(self._deleted))]


class Informer(Generic[Record]):
    """Keeps a store up to date for as long as `run` runs."""

    def __init__(
        self,
        client: Client,
        kind: Kind[Record],
        store: Store[Record],
        *,
        namespace: str = "",
        count_restart: Callable[[str, str], None],
    ) -> None:
        self._client = client
        self._kind = kind
        self._store = store
        self._namespace = namespace
        self._count_restart = count_restart
        self._last_sign = time.monotonic()
        self._version = ""
        self._failures = 0
        self.synced = asyncio.Event()
        self.resource = kind.resource.plural

    def age(self) -> float:
        """Seconds since the API server last said anything on the list or the watch."""
        return time.monotonic() - self._last_sign

    async def run(self) -> None:
        """List, watch, resume; list again when the version has expired. Ends by cancellation only."""
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
                log.warning("the watch of %s broke and is resumed: %s", self.resource, error)
            await asyncio.sleep(min(0.1 * 2.0 ** min(self._failures, 10), _BACKOFF_LIMIT) * random.uniform(0.5, 1.5))

    async def _list(self) -> None:
        records: list[Record] = []
        version, known = "", self._store.uids(self._namespace)
        pages = self._client.list_pages(
            self._kind.resource, self._namespace, selector=names.MANAGED_SELECTOR, shape=self._kind.shape
        )
        async for items, version in pages:  # noqa: B007  # the last page's is used
            self._last_sign = time.monotonic()
            records.extend(self._kind.parse(raw) for raw in items)
        self._store.replace_all(records, within=self._namespace, known=known)
        self._version = version
        self.synced.set()

    async def _watch(self) -> None:
        events = self._client.watch(
            self._kind.resource,
            self._namespace,
            selector=names.MANAGED_SELECTOR,
            resource_version=self._version,
            shape=self._kind.shape,
        )
        async for type_, raw in events:
            self._last_sign = time.monotonic()
            self._version = raw["metadata"]["resourceVersion"]
            self._failures = 0
            self._handle(type_, raw)

    def _handle(self, type_: EventType, raw: Object) -> None:
        if type_ == "DELETED":
            self._store.delete(raw)
        elif type_ != "BOOKMARK":
            self._store.put(raw)


def mark_gone(record: Mortal) -> Mortal:
    """The last state of a deleted Job or pod."""
    return replace(record, is_gone=True)


def _key(record: JobRecord | PodRecord | ServiceRecord) -> Key:
    return record.namespace, record.run


def _is_gone(record: JobRecord | PodRecord | ServiceRecord) -> bool:
    return isinstance(record, JobRecord | PodRecord) and record.is_gone
