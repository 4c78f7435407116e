"""Watch of runs by kopf: feeds events into the store and the work queue. Built by `app.py`.

Only `on.event` is used: no finalizers, annotations, timers or indices, so kopf itself never writes to a run.

kopf works through an HTTP session of ours. A malformed response, an expired version or a server error on a watch would
end kopf, and the process with it. The session turns them into errors that kopf recovers from: a failed connection, or a
410 event. It also drops events that carry a known version. Most of them are our own status writes, and kopf takes about
a millisecond for each event.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any, cast

import aiohttp
import kopf
import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.untrusted import DocumentError, decode_json
from sailvl_operator.cluster.background import CountError, contain_errors
from sailvl_operator.cluster.client import WATCH_SILENCE_SECONDS, ClientConfig
from sailvl_operator.cluster.credentials import Credentials, build_connector
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.cluster.watch_stream import read_line_batches
from sailvl_operator.cluster.workqueue import WorkQueue

OnEvent = Callable[[str | None, dict[str, Any]], None]
"""Called with the type of a watch event (None: the object comes from a list) and the whole object."""
IsKnown = Callable[[str, str, str], bool]
"""Called with namespace, name and resourceVersion of an object. Whether this version or a newer one is known."""

LIST_CHUNK_SIZE = 50
"""Runs in one response of the first list: at most 75 MB, since a stored object has at most 1.5 MB."""

_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}\n'


def handle_run_event(type_: str | None, raw: dict[str, Any], runs: RunStore, queue: WorkQueue[RunKey]) -> None:
    """Store the state of a run if it is newer than the stored one, and queue its key if anything changed.

    `type_`: type of the watch event; None for an object from a list.
    """
    metadata = raw["metadata"]
    key = metadata["namespace"], metadata["name"]
    if type_ == "DELETED":
        runs.delete(key, metadata["uid"])
        queue.add(key)
    elif runs.put(raw):
        queue.add(key)


def build_registry(
    on_event: OnEvent,
    credentials: Credentials,
    *,
    is_known: IsKnown,
    on_stop: Callable[[], None],
    count_error: CountError,
) -> kopf.OperatorRegistry:
    """Build a registry with kopf's handlers and settings.

    Events whose resourceVersion is already stored (`is_known`) are filtered out. `on_stop` is called as soon as this
    process is asked to terminate. `count_error` is called for each event that can't be handled.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.scanning.disabled = True
        settings.peering.standalone = True
        settings.watching.server_timeout = ClientConfig().watch_timeout_seconds
        settings.watching.connect_timeout = 10
        settings.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
        settings.watching.chunk_size = LIST_CHUNK_SIZE
        settings.networking.request_timeout = ClientConfig().request_timeout_seconds
        settings.networking.error_backoffs = EndlessBackoff()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        on_stop()  # kopf waits up to 5 s for all tasks of the event loop, ours included

    @kopf.on.login(registry=registry)
    async def connect(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=credentials.server, aiohttp_session=build_session(credentials, is_known))

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def on_run_event(event: kopf.RawEvent, **_: Any) -> None:
        with contain_errors("runs", count_error, subject="an event of a run"):
            on_event(event["type"], dict(event["object"]))

    return registry


class NoDiffBase(kopf.DiffBaseStorage):
    """Stores no last-handled configuration. kopf would copy every object to compute diffs that we don't use."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


class EndlessBackoff(Iterable[float]):
    """Seconds between the tries of kopf's requests. kopf gives up after the last one, but an outage may last for
    hours."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.2, 0.5, 1.0, 2.0), repeat(5.0))


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class _Metadata(msgspec.Struct, frozen=True):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""  # spelled as in the API


class _Object(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


def build_session(credentials: Credentials, is_known: IsKnown = lambda *_: False) -> aiohttp.ClientSession:
    """Build the HTTP session of kopf; the caller closes it."""

    async def send(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers.update(await credentials.headers())
        return await handler(request)

    async def recover(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        response = await send(request, handler)
        if response.status == 401:
            credentials.forget()
            response.release()
            response = await send(request, handler)
        if response.status == 401:
            raise aiohttp.ClientConnectionError("401: the credentials are invalid or have expired")
        if response.status == 410 and "continue" in request.url.query:
            response.release()
            request.url = request.url.without_query_params("continue")
            response = await send(request, handler)  # the first page again: kopf would end the process
        is_watch = "watch" in request.url.query
        if is_watch and response.status in (200, 410):
            return _filter_events(response, is_known)
        if response.status == 200:
            await _check_json(response)
        return response

    return aiohttp.ClientSession(
        connector=build_connector(credentials, limit=0),
        headers={"User-Agent": names.FIELD_MANAGER},
        middlewares=[recover],
    )


async def _check_json(response: aiohttp.ClientResponse) -> None:
    try:
        decode_json(await response.read(), dict[str, msgspec.Raw], subject="the response")
    except (DocumentError, aiohttp.ClientPayloadError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error


def _filter_events(response: aiohttp.ClientResponse, is_known: IsKnown) -> aiohttp.ClientResponse:
    """Replace the content of a watch response by its unknown events, in a form that kopf can handle."""
    is_expired = response.status == 410
    response.status = 200
    content = _FilteredContent(response.content, is_known, is_expired=is_expired)
    response.content = cast("aiohttp.StreamReader", content)
    return response


class _FilteredContent:
    """Stream of the complete lines of a watch; a malformed line ends it like a failed connection. Everything except
    `iter_chunked` is delegated to the original stream."""

    def __init__(self, content: aiohttp.StreamReader, is_known: IsKnown, *, is_expired: bool) -> None:
        self._content, self._is_known, self._is_expired = content, is_known, is_expired

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        if self._is_expired:
            yield _EXPIRED
            return
        async for lines in read_line_batches(self._content.iter_chunked(size)):
            unknown = [line + b"\n" for line in lines if not _is_known_event(line, self._is_known)]
            if unknown:
                yield b"".join(unknown)


def _is_known_event(line: bytes, is_known: IsKnown) -> bool:
    """Whether a line is a change to a version that is known already.

    Raises ClientPayloadError if the line is malformed or reports an error other than 410.
    """
    try:
        event = decode_json(line, _Event, subject="an event")
        if event.type == "MODIFIED":
            changed = decode_json(event.object, _Object, subject="an event").metadata
            return is_known(changed.namespace, changed.name, changed.resourceVersion)
        reported = decode_json(event.object, _Status, subject="an event") if event.type == "ERROR" else None
    except DocumentError as error:
        raise aiohttp.ClientPayloadError(str(error)) from error
    if reported is not None and reported.code != 410:
        raise aiohttp.ClientPayloadError(f"{reported.code} {reported.reason}: {reported.message}")
    return False
