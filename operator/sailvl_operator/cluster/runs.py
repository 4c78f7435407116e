"""Store of the newest state of every SailVLRun, filled by the watch (`handlers.py`) and by responses to our patches.

A run is kept as JSON until it is read. It is then parsed in its turn of the work queue, and once for any number of
changes since the last turn: a user who edits a large spec again and again delays no other namespace.

Most runs of a long-lived installation have finished, and a finished run is rarely read again. Such runs are kept as
compressed JSON and parsed again whenever one is reconciled.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.parse import MAX_ANNOTATION_LENGTH, MAX_SPEC_BYTES, SpecError, parse_run, refresh_run
from sailvl_operator.api.status import ConditionType, Status, decode_status
from sailvl_operator.api.types import Model, Run, Spec, Storage
from sailvl_operator.api.untrusted import clean_line, describe_error
from sailvl_operator.cluster.edit_limit import EditLimit
from sailvl_operator.cluster.resources import SailVLRun
from sailvl_operator.core.plan import PlannedStage, plan
from sailvl_operator.core.units import parse_time

log = logging.getLogger(__name__)

RunKey = tuple[str, str]
"""Namespace and name of a run; the keys of the work queue."""

_METADATA = ("namespace", "name", "uid", "generation", "creationTimestamp", "deletionTimestamp")
_FINAL = (ConditionType.SUCCEEDED, ConditionType.FAILED)
_COMPRESSION_LEVEL = 1  # higher levels save a few percent and take several times longer


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEntry:
    """Newest state of one run."""

    run: Run
    planned: tuple[PlannedStage, ...] = ()
    """Stages of the run; computed once per spec, since they follow from the spec alone."""
    problem: str = ""
    """Parse error of the spec; `run.spec` is then empty. Empty if the spec is valid."""


class RunVersion(NamedTuple):
    """UID and resourceVersion of a stored run."""

    uid: str
    version: int


class _Stored(NamedTuple):
    """One run, either parsed or as JSON."""

    uid: str
    version: int
    generation: int
    entry: RunEntry | None
    """The run with the spec that was parsed last and with its newest status; None if it has finished or is new."""
    document: bytes = b""
    """JSON of the object without its version, compressed if the run has finished; empty if the newest spec is
    parsed."""
    is_finished: bool = False
    """Whether the run has finished and is not parsed."""
    edited_bytes: int = 0
    """Size of the document before compression if the spec has changed since it was last read, else 0."""

    def read(self) -> RunEntry:
        return _parse(self._decode()) if self.entry is None or self.document else self.entry

    def read_status(self) -> Status:
        return decode_status(self._decode()["status"] if self.entry is None else self.entry.run.status)

    def _decode(self) -> dict[str, Any]:
        document = zlib.decompress(self.document) if self.is_finished else self.document
        decoded: dict[str, Any] = msgspec.json.decode(document, type=SailVLRun)
        decoded["metadata"]["resourceVersion"] = str(self.version)
        return decoded

    def is_same(self, other: _Stored) -> bool:
        """Whether nothing that is read differs except the version."""
        if self.document or other.document or self.entry is None or other.entry is None:
            return self.document == other.document
        return self.entry.run == msgspec.structs.replace(
            other.entry.run, resource_version=self.entry.run.resource_version
        )


class RunStore:
    """Runs by key. An older resourceVersion never replaces a newer one."""

    def __init__(self, edit_limit: EditLimit | None = None) -> None:
        self._runs: dict[RunKey, _Stored] = {}
        self._edit_limit = edit_limit or EditLimit()

    def get(self, key: RunKey) -> RunEntry | None:
        """Return the newest state; None if there is no such run. A finished run is parsed anew by each call."""
        stored = self._runs.get(key)
        if stored is None:
            return None
        entry = stored.read()
        if stored.edited_bytes:
            self._edit_limit.count_edit(key[0], stored.edited_bytes)
        if stored.edited_bytes or (stored.document and not stored.is_finished):
            document = stored.document if stored.is_finished else b""
            self._runs[key] = stored._replace(
                entry=None if stored.is_finished else entry, document=document, edited_bytes=0
            )
        return entry

    def get_wait_seconds(self, key: RunKey) -> float:
        """Return for how long a run should not be read, because of too many edits in its namespace; usually 0."""
        stored = self._runs.get(key)
        return self._edit_limit.get_wait_seconds(key[0]) if stored is not None and stored.edited_bytes else 0.0

    def get_unfinished(self, key: RunKey) -> RunEntry | None:
        """Return a run with its newest status; None if it has finished or doesn't exist. Its spec is the one that was
        parsed last, and may be older."""
        stored = self._runs.get(key)
        if stored is None or stored.is_finished:
            return None
        return stored.entry or self.get(key)

    def get_version(self, key: RunKey) -> RunVersion | None:
        """Return UID and resourceVersion of a run without parsing it; None if there is no such run."""
        stored = self._runs.get(key)
        return None if stored is None else RunVersion(stored.uid, stored.version)

    def versions(self) -> dict[RunKey, RunVersion]:
        """Return UID and resourceVersion of every run."""
        return {key: RunVersion(stored.uid, stored.version) for key, stored in self._runs.items()}

    def statuses(self) -> list[tuple[str, str, Any]]:
        """Return namespace and name of every run, and a function that decodes its status."""
        return [(*key, stored.read_status) for key, stored in self._runs.items()]

    def __iter__(self) -> Iterator[RunEntry]:
        return (stored.read() for stored in list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    def is_known(self, namespace: str, name: str, version: str) -> bool:
        """Whether this resourceVersion of a run, or a newer one, is stored."""
        known = self._runs.get((namespace, name))
        return known is not None and bool(version) and known.version >= int(version)

    def put(self, raw: dict[str, Any]) -> bool:
        """Store a state if it is newer than the stored one. Return whether anything that is read has changed: users may
        change other metadata in a loop, which needs no reconcile."""
        key, version = key_of(raw), int(raw["metadata"]["resourceVersion"])
        known = self._runs.get(key)
        if known is not None and known.version >= version:
            return False
        known = known if known is not None and known.uid == raw["metadata"]["uid"] else None
        stored = self._runs[key] = _build_stored(raw, version, known)
        return known is None or not stored.is_same(known)

    def put_patched(self, raw: dict[str, Any]) -> bool:
        """Store the response to our own patch, unless the run was deleted meanwhile."""
        known = self._runs.get(key_of(raw))
        return known is not None and known.uid == raw["metadata"]["uid"] and self.put(raw)

    def delete(self, key: RunKey, uid: str) -> None:
        """Remove a deleted run, unless a new run already has its name."""
        known = self._runs.get(key)
        if known is not None and known.uid == uid:
            del self._runs[key]


def key_of(raw: dict[str, Any]) -> RunKey:
    """Return namespace and name of a raw object."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def _is_finished(raw: dict[str, Any]) -> bool:
    """Return whether the status says that the run has succeeded or failed."""
    conditions = (raw.get("status") or {}).get("conditions") or ()
    return any(c.get("type") in _FINAL and c.get("status") == "True" for c in conditions)


def _build_stored(raw: dict[str, Any], version: int, known: _Stored | None) -> _Stored:
    """Reuse the parsed spec of an active run if the generation is the same; most changes are our own status writes.
    Else keep the object as JSON, or parse it at once if that is impossible. `known`: an earlier version of the run."""
    uid, generation = raw["metadata"]["uid"], raw["metadata"].get("generation", 1)
    is_finished = _is_finished(raw)
    entry = None if known is None or known.entry is None or is_finished else _refresh(known.entry, raw)
    if entry is not None and entry.run.generation == generation:
        return _Stored(uid, version, generation, entry)
    document = _encode(raw)
    is_edited = known is not None and (known.edited_bytes > 0 or known.generation != generation)
    if not document:
        return _Stored(uid, version, generation, _parse(raw), edited_bytes=int(is_edited))
    return _Stored(
        uid,
        version,
        generation,
        entry,
        zlib.compress(document, _COMPRESSION_LEVEL) if is_finished else document,
        is_finished,
        len(document) if is_edited else 0,
    )


def _refresh(entry: RunEntry, raw: dict[str, Any]) -> RunEntry:
    """Return a run with the metadata and status of a newer object; the spec stays as it is."""
    return replace(entry, run=refresh_run(entry.run, raw))


def _encode(raw: dict[str, Any]) -> bytes:
    """Encode the fields of an object that are read as JSON. Return nothing if its spec is too large to be parsed
    anyway, or if it can't be encoded: a text may have half of a surrogate pair."""
    metadata = {name: raw["metadata"][name] for name in _METADATA if name in raw["metadata"]}
    request = (raw["metadata"].get("annotations") or {}).get(names.ANNOTATION_RESTART)
    if request is not None:
        metadata["annotations"] = {names.ANNOTATION_RESTART: clean_line(request, MAX_ANNOTATION_LENGTH)}
    try:
        spec = msgspec.json.encode(raw.get("spec") or {})
        if max(len(spec), raw.get("spec_bytes", 0)) > MAX_SPEC_BYTES:
            return b""
        document = {"metadata": metadata, "spec": msgspec.Raw(spec), "status": raw.get("status") or {}}
        return bytes(memoryview(msgspec.json.encode(document)))  # a copy, as msgspec's buffer may be half empty
    except (UnicodeEncodeError, RecursionError):
        return b""


def _parse(raw: dict[str, Any]) -> RunEntry:
    try:
        run = parse_run(raw)
        return RunEntry(run=run, planned=plan(run))
    except SpecError as error:
        return RunEntry(run=_without_spec(raw), problem=str(error))
    except Exception as error:
        log.exception("internal error, spec of %s/%s not read", *key_of(raw))
        return RunEntry(run=_without_spec(raw), problem=f"the spec can't be read: {describe_error(error)}")


def _without_spec(raw: dict[str, Any]) -> Run:
    """Build a run with an empty spec, enough to write a status that reports the parse error."""
    metadata = raw["metadata"]
    return Run(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        created=parse_time(metadata.get("creationTimestamp")),
        deleting="deletionTimestamp" in metadata,
        spec=Spec(storage=Storage(), model=Model(preset="tiny"), stages=()),
        status=raw.get("status") or {},
    )
