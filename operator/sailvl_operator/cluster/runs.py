"""Store of the newest state of every SailVLRun, filled by the watch (`handlers.py`) and by responses to our patches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sailvl_operator.api.parse import SpecError, parse_run, refresh_run
from sailvl_operator.api.types import Model, Run, Spec, Storage
from sailvl_operator.api.untrusted import describe_error
from sailvl_operator.core.plan import PlannedStage, plan
from sailvl_operator.core.units import parse_time

log = logging.getLogger(__name__)

RunKey = tuple[str, str]
"""Namespace and name of a run; the keys of the work queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEntry:
    """Newest state of one run."""

    run: Run
    planned: tuple[PlannedStage, ...] = ()
    """Stages of the run; computed once per spec, since they follow from the spec alone."""
    problem: str = ""
    """Parse error of the spec; `run.spec` is then empty. Empty if the spec is valid."""


class RunStore:
    """Runs by key. An older resourceVersion never replaces a newer one."""

    def __init__(self) -> None:
        self._entries: dict[RunKey, RunEntry] = {}

    def get(self, key: RunKey) -> RunEntry | None:
        """Return the newest state; None if there is no such run."""
        return self._entries.get(key)

    def __iter__(self) -> Iterator[RunEntry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def is_known(self, namespace: str, name: str, version: str) -> bool:
        """Whether this resourceVersion of a run, or a newer one, is stored."""
        known = self._entries.get((namespace, name))
        return known is not None and bool(version) and int(known.run.resource_version) >= int(version)

    def put(self, raw: dict[str, Any]) -> bool:
        """Store a state if it is newer than the stored one. Return whether it is."""
        key, version = key_of(raw), int(raw["metadata"]["resourceVersion"])
        known = self._entries.get(key)
        if known is not None and int(known.run.resource_version) >= version:
            return False
        self._entries[key] = _parse_update(raw, known) if known is not None else _parse(raw)
        return True

    def put_patched(self, raw: dict[str, Any]) -> bool:
        """Store the response to our own patch, unless the run was deleted meanwhile."""
        known = self._entries.get(key_of(raw))
        return known is not None and known.run.uid == raw["metadata"]["uid"] and self.put(raw)

    def delete(self, key: RunKey, uid: str) -> None:
        """Remove a deleted run, unless a new run already has its name."""
        known = self._entries.get(key)
        if known is not None and known.run.uid == uid:
            del self._entries[key]


def key_of(raw: dict[str, Any]) -> RunKey:
    """Return namespace and name of a raw object."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def _parse_update(raw: dict[str, Any], known: RunEntry) -> RunEntry:
    """Reuse the parsed spec if the generation is the same. Most changes are our own status writes."""
    metadata = raw["metadata"]
    if (metadata["uid"], metadata.get("generation")) != (known.run.uid, known.run.generation):
        return _parse(raw)
    return replace(known, run=refresh_run(known.run, raw))


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
