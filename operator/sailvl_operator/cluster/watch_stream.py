"""Reading of watch streams: lines in batches, and each line as an event.

Used by `client.py`, and by `handlers.py` for kopf's watch of runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from functools import cache
from typing import Any, Literal, NamedTuple, TypedDict, cast

import msgspec

from sailvl_operator.api.untrusted import DocumentError, decode_json
from sailvl_operator.cluster.resources import ObjectType
from sailvl_operator.errors import Gone, Unreachable, error_from_status

Object = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]

BATCH_SECONDS = 0.1
"""Pause between two reads of a stream; data that arrives meanwhile waits in the socket."""
_LARGE_READ = 65536
"""Bytes of a read that is followed by the next without a pause, so that the reader catches up."""


class WatchEvent(NamedTuple):
    """One event of a watch. The object of a bookmark has a resourceVersion only."""

    type: EventType
    object: Object


async def read_line_batches(chunks: AsyncIterable[bytes]) -> AsyncIterator[list[bytes]]:
    """Split a watch stream into lines of any length and yield those that each chunk completes, without newlines.

    Reads in batches: changes arrive in bursts, and waking up per chunk costs more CPU than decoding it. An incomplete
    last line is dropped.
    """
    pending: list[bytes] = []  # parts of the incomplete line
    async for chunk in chunks:
        end, *lines = chunk.split(b"\n")
        pending.append(end)
        if lines:
            whole, pending = b"".join(pending), [lines.pop()]
            yield [whole, *lines]
        await _pause_after(len(chunk), is_whole=pending == [b""])


async def _pause_after(read: int, *, is_whole: bool) -> None:
    """Pause after a read of some bytes, unless it was large or ended within a line."""
    if is_whole and read < _LARGE_READ:
        await asyncio.sleep(BATCH_SECONDS)


def decode_event(line: bytes, path: str, decode_as: ObjectType) -> WatchEvent:
    """Decode a line of a watch. Errors and bookmarks are decoded a second time, as dicts: their objects need not match
    `decode_as` (a bookmark has nulls where other objects have lists).

    Raises Unreachable if the line is malformed, Gone if the watch has expired, and ApiError for other reported errors.
    """
    malformed: Exception | None = None
    try:
        event = decode_json(line, _event_type(decode_as), subject="an event")
        if event["type"] != "ERROR":
            return WatchEvent(cast("EventType", event["type"]), event["object"])
    except DocumentError as error:
        malformed = error
    type_, found = _decode_untyped(line)
    if type_ == "BOOKMARK":
        return WatchEvent("BOOKMARK", found)
    if type_ != "ERROR":
        raise Unreachable(f"watch {path}: {malformed}") from malformed
    reported = error_from_status(found.get("code", 500), found, request=f"watch {path}")
    raise Gone(str(reported), status=410, reason="Expired") if reported.reason == "Expired" else reported


def _decode_untyped(line: bytes) -> tuple[str, Object]:
    """Return type and object of an event; an empty type and no object if it is neither an error nor a bookmark, whose
    objects are small."""
    try:
        event: _RawEvent = decode_json(line, _RawEvent, subject="an event")
        if event.type in ("ERROR", "BOOKMARK"):
            return event.type, decode_json(memoryview(event.object), dict, subject="an event")
    except DocumentError:
        pass
    return "", {}


class _RawEvent(msgspec.Struct):
    """An event whose object is not decoded."""

    type: str
    object: msgspec.Raw


@cache
def _event_type(decode_as: ObjectType) -> Any:
    make: Any = TypedDict  # type checkers accept literal field types only
    return make("event", {"type": str, "object": decode_as})
