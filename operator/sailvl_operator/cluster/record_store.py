"""Store of the records of one kind of owned object, indexed by run.

Filled by an informer and by the responses to the operator's own writes; read by the controller. The last state of a
deleted Job or pod is kept, marked as gone, until the controller forgets it: it is the evidence of how an attempt ended.
Anyone with write access to a namespace can create and delete objects with the operator's labels, so it is kept only of
the run's own objects that a decision may depend on, and of few for each place in an attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec.structs import replace

from sailvl_operator.cluster.resources import ObjectType, Resource
from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.cluster.watch_stream import Object
from sailvl_operator.core.observe import JobRecord, NetworkPolicyRecord, PodRecord, ServiceRecord

AnyRecord = JobRecord | PodRecord | ServiceRecord | NetworkPolicyRecord
Record = TypeVar("Record", bound=AnyRecord)
Mortal = TypeVar("Mortal", JobRecord, PodRecord)

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
    get_place: Callable[[Record], Hashable] = lambda record: record.uid
    """Function that returns the place of an object in its run, such as stage, attempt and index of a pod."""
    max_gone: int = 1
    """Number of deleted objects of one place whose last state is kept; those deleted first are dropped."""
    stamp: Callable[[Record, Record | None, float], Record] = lambda record, _known, _now: record
    """Function that adds times to a new record, given the record before and the time now in Unix seconds."""
    is_routine: Callable[[Record], bool] = lambda _: False
    """Whether the record needs no action, only a status update. Default: never."""


class Store(Generic[Record]):
    """Records by run and UID. Each change is reported with the run's key: to `on_routine_change` if it needs no action,
    else to `on_change`.

    `retains_deleted`: whether the last state of a deleted object is kept until `forget`, if `is_evidence` holds.
    """

    def __init__(
        self,
        kind: Kind[Record],
        on_change: Callable[[RunKey], None],
        clock: Callable[[], float] = time.time,
        *,
        on_routine_change: Callable[[RunKey], None] | None = None,
        is_evidence: Callable[[Record], bool] = lambda _: True,
    ) -> None:
        self._kind = kind
        self._on_change = on_change
        self._on_routine_change = on_routine_change or on_change
        self._is_evidence = is_evidence
        self._clock = clock
        self._by_key: dict[RunKey, dict[str, Record]] = {}
        self._keys: dict[str, RunKey] = {}  # by UID; a client may change the label that names the run
        self._gone: dict[tuple[RunKey, Hashable], list[str]] = {}  # UIDs of gone records by place, in order of deletion
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
        for record in [r for r in records.values() if _is_gone(r) and is_closed(r)]:
            del records[record.uid]
            self._forget_key(record.uid, key)
            self._forget_gone(record, key)
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
        is_kept = self._should_retain(record)
        if is_kept and self._kind.mark_gone is not None:
            records[record.uid] = self._kind.stamp(self._kind.mark_gone(record), known, self._clock())
            self._drop_oldest_gone(record, key)
        else:
            records.pop(record.uid, None)
        if not records:
            del self._by_key[key]
        self._on_change(key)
        return not is_kept

    def _should_retain(self, record: Record) -> bool:
        return self.retains_deleted and self._kind.mark_gone is not None and self._is_evidence(record)

    def _drop_oldest_gone(self, newest: Record, key: RunKey) -> None:
        """Drop the gone record of the same place that is oldest if there are too many with this new one."""
        uids = self._gone.setdefault((key, self._kind.get_place(newest)), [])
        uids.append(newest.uid)
        if len(uids) > self._kind.max_gone:
            oldest = uids.pop(0)
            del self._by_key[key][oldest]
            self._forget_key(oldest, key)
            self._remember_deleted(oldest)

    def _forget_gone(self, record: Record, key: RunKey) -> None:
        place = key, self._kind.get_place(record)
        self._gone[place].remove(record.uid)
        if not self._gone[place]:
            del self._gone[place]

    def _forget_key(self, uid: str, key: RunKey) -> None:
        if self._keys.get(uid) == key:
            del self._keys[uid]

    def _remember_deleted(self, uid: str) -> None:
        self._deleted_uids[uid] = None
        if len(self._deleted_uids) > _DELETED_UIDS_LIMIT:
            del self._deleted_uids[next(iter(self._deleted_uids))]


def mark_gone(record: Mortal) -> Mortal:
    """Return the last state of a deleted Job or pod, marked as gone."""
    return replace(record, is_gone=True)


def _run_key(record: AnyRecord) -> RunKey:
    return record.namespace, record.run


def _is_gone(record: AnyRecord) -> bool:
    return isinstance(record, JobRecord | PodRecord) and record.is_gone
