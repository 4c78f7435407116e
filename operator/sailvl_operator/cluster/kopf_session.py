"""The session by which kopf reads. A broken answer, an expired version or a server's own trouble on a watch would end
kopf, and the process with it; here they become what kopf mends by itself: a connection that failed, or a 410 event.

Changes that are known already are left out: most are our own writes of statuses, and kopf takes a millisecond for each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import aiohttp
import msgspec

from sailvl_operator.api import names
from sailvl_operator.cluster import gulps
from sailvl_operator.cluster.credentials import Credentials, build_connector

_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}\n'


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


IsKnown = Callable[[str, str, str], bool]
"""Whether the state of a namespace's object, by name and resourceVersion, or a newer one, is known."""


class _Metadata(msgspec.Struct, frozen=True):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""  # as the API has it


class _Object(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


def build_session(credentials: Credentials, is_known: IsKnown = lambda *_: False) -> aiohttp.ClientSession:
    """To be closed by whom it is given to."""

    async def send(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers.update(await credentials.headers())
        return await handler(request)

    async def carry(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        response = await send(request, handler)
        if response.status == 401:
            credentials.forget()
            response.release()
            response = await send(request, handler)
        if response.status == 401:
            raise aiohttp.ClientConnectionError("401: the credentials are unknown or have expired")
        is_watch = "watch" in request.url.query
        if is_watch and response.status in (200, 410):
            return _pass_on_events(response, is_known)
        if response.status == 200:
            await _check(response)
        return response

    return aiohttp.ClientSession(
        connector=build_connector(credentials, limit=0),
        headers={"User-Agent": names.FIELD_MANAGER},
        middlewares=[carry],
    )


async def _check(response: aiohttp.ClientResponse) -> None:
    try:
        msgspec.json.decode(await response.read(), type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, aiohttp.ClientPayloadError) as error:
        raise aiohttp.ClientConnectionError(f"the answer is broken: {error}") from error


def _pass_on_events(response: aiohttp.ClientResponse, is_known: IsKnown) -> aiohttp.ClientResponse:
    """The answer to a watch, with those events only that kopf can live with and that are news."""
    is_expired = response.status == 410
    response.status = 200
    response.content = cast("aiohttp.StreamReader", _Events(response.content, is_known, is_expired=is_expired))
    return response


class _Events:
    """A watch's whole lines; what can't be read ends it as a broken connection does. All else is the stream's."""

    def __init__(self, content: aiohttp.StreamReader, is_known: IsKnown, *, is_expired: bool) -> None:
        self._content, self._is_known, self._is_expired = content, is_known, is_expired

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        if self._is_expired:
            yield _EXPIRED
            return
        pending = b""
        async for chunk in self._content.iter_chunked(size):
            whole, _, pending = (pending + chunk).rpartition(b"\n")
            news = [line + b"\n" for line in whole.splitlines() if _is_news(line, self._is_known)]
            if news:
                yield b"".join(news)
            await gulps.pause(len(chunk), is_whole=not pending)


def _is_news(line: bytes, is_known: IsKnown) -> bool:
    """Raises ClientPayloadError for what can't be read."""
    try:
        event = msgspec.json.decode(line, type=_Event)
        if event.type == "MODIFIED":
            changed = msgspec.json.decode(event.object, type=_Object).metadata
            return not is_known(changed.namespace, changed.name, changed.resourceVersion)
        trouble = msgspec.json.decode(event.object, type=_Status) if event.type == "ERROR" else None
    except msgspec.MsgspecError as error:
        raise aiohttp.ClientPayloadError(f"an event is broken: {error}") from error
    if trouble is not None and trouble.code != 410:
        raise aiohttp.ClientPayloadError(f"{trouble.code} {trouble.reason}: {trouble.message}")
    return True
