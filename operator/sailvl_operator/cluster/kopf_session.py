"""HTTP session of kopf, through which it lists and watches runs. Used by `handlers.py`.

It keeps kopf within bounds and alive:

- kopf gets the identity of a run, and the fields that the operator reads as text (`KopfObject`). kopf would hold any
  other metadata, with which users can fill 1.5 MiB, as dicts of ten times that size for seconds. It would also write to
  a run that carries a finalizer or an annotation of kopf.
- A page of a list that is too large is requested again with fewer runs.
- Changes that carry a known version are dropped. Most of them are our own status writes, and kopf takes about a
  millisecond for each event.
- A malformed response, an expired version or a server error on a watch would end kopf, and the process with it. They
  become errors that kopf recovers from: a failed connection, or a 410 event.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypedDict, cast

import aiohttp
import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.parse import MAX_SPEC_BYTES
from sailvl_operator.api.untrusted import DocumentError, decode_json
from sailvl_operator.cluster.credentials import Credentials, build_connector
from sailvl_operator.cluster.page_limit import PageLimit, PageTooLargeError, read_page
from sailvl_operator.cluster.resources import RunMeta, SailVLRun
from sailvl_operator.cluster.watch_stream import read_line_batches

IsKnown = Callable[[str, str, str], bool]
"""Called with namespace, name and resourceVersion of an object. Whether this version or a newer one is known."""

LIST_CHUNK_SIZE = 50
"""Maximum number of runs in one page of kopf's lists."""

_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}\n'
_KOPF_FIELDS = ("namespace", "name", "uid", "resourceVersion")


class KopfMeta(TypedDict, total=False):
    """The metadata of a run that kopf reads. It has no finalizers and no annotations, so that kopf finds none of its
    own."""

    namespace: str
    name: str
    uid: str
    resourceVersion: str


class KopfObject(TypedDict, total=False):
    """A run as kopf gets it.

    `document`: the run as JSON in base64. kopf's JSON decoder copies it as it is, and a string of it takes one byte per
    letter, where other text can take four.
    """

    metadata: KopfMeta
    document: str


def decode_run(passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run, of the type SailVLRun, that was passed to kopf as this KopfObject."""
    decoded: dict[str, Any] = msgspec.json.decode(base64.b64decode(passed["document"]), type=SailVLRun)
    return decoded


class _Run(msgspec.Struct):
    """A run as the API server sends it: fields that are not read are skipped, and spec and status stay JSON."""

    metadata: RunMeta = msgspec.field(default_factory=RunMeta)  # an error has none
    spec: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    status: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _LargeRun(msgspec.Struct):
    """A run whose spec is left out, because it is too large to be parsed."""

    metadata: RunMeta
    spec_bytes: int
    status: msgspec.Raw | msgspec.UnsetType


class _Event(msgspec.Struct):
    type: str
    object: _Run


class _Page(msgspec.Struct):
    metadata: dict[str, Any]
    items: list[_Run] | None = None


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class _ErrorEvent(msgspec.Struct):
    type: str
    object: _Status


def build_session(credentials: Credentials, is_known: IsKnown = lambda *_: False) -> aiohttp.ClientSession:
    """Build the HTTP session of kopf; the caller closes it."""
    limits: dict[str, PageLimit] = defaultdict(partial(PageLimit, LIST_CHUNK_SIZE))  # by the path of the list

    async def handle(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        async def send() -> aiohttp.ClientResponse:
            return await _send(request, handler, credentials)

        is_watch, is_runs = "watch" in request.url.query, request.url.path.endswith(f"/{names.PLURAL}")
        if is_runs and not is_watch:
            return await _list_runs(request, send, limits[request.url.path])
        response = await send()
        if is_watch and response.status in (200, 410):
            return _filter_events(response, is_known)
        if response.status == 200:
            await _check_json(response)
        return response

    return aiohttp.ClientSession(
        connector=build_connector(credentials, limit=0),
        headers={"User-Agent": names.FIELD_MANAGER},
        middlewares=[handle],
    )


async def _send(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType, credentials: Credentials
) -> aiohttp.ClientResponse:
    """Send a request with the newest token, and again if that has expired, or if the next page of a list has."""
    request.headers.update(await credentials.headers())
    response = await handler(request)
    if response.status == 401:
        credentials.forget()
        response.release()
        request.headers.update(await credentials.headers())
        response = await handler(request)
    if response.status == 401:
        raise aiohttp.ClientConnectionError("401: the credentials are invalid or have expired")
    if response.status == 410 and "continue" in request.url.query:
        response.release()
        request.url = request.url.without_query_params("continue")
        response = await handler(request)  # the first page again: kopf would end the process
    return response


async def _list_runs(
    request: aiohttp.ClientRequest, send: Callable[[], Awaitable[aiohttp.ClientResponse]], limit: PageLimit
) -> aiohttp.ClientResponse:
    """Return a page of runs in the form that kopf gets, of fewer runs than kopf asks for if they are large."""
    while True:
        request.url = request.url.update_query(limit=str(limit.objects))
        response = await send()
        if response.status != 200:
            return response
        try:
            content = await read_page(response, limit.max_bytes)
            page = decode_json(content, _Page, subject="the response")
        except PageTooLargeError:
            response.close()
            limit.shrink()
            continue
        except (DocumentError, aiohttp.ClientPayloadError) as error:
            raise aiohttp.ClientConnectionError(str(error)) from error
        limit.grow(len(content))
        return _replace_content(response, _ConvertedPage(response.content, _convert_page(page)))


async def _check_json(response: aiohttp.ClientResponse) -> None:
    try:
        decode_json(await response.read(), dict[str, msgspec.Raw], subject="the response")
    except (DocumentError, aiohttp.ClientPayloadError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error


def _filter_events(response: aiohttp.ClientResponse, is_known: IsKnown) -> aiohttp.ClientResponse:
    """Replace the content of a watch response by its unknown events, in the form that kopf gets."""
    is_expired = response.status == 410
    response.status = 200
    return _replace_content(response, _ConvertedWatch(response.content, is_known, is_expired=is_expired))


def _replace_content(response: aiohttp.ClientResponse, content: _Content) -> aiohttp.ClientResponse:
    response.content = cast("aiohttp.StreamReader", content)
    return response


class _Content:
    """Stream that replaces the content of a response. Whatever it doesn't define is delegated to the original."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)


class _ConvertedPage(_Content):
    """Page of a list that has been read."""

    def __init__(self, content: aiohttp.StreamReader, page: bytes) -> None:
        super().__init__(content)
        self._page = page

    async def read(self) -> bytes:
        return self._page


class _ConvertedWatch(_Content):
    """Stream of the complete lines of a watch; a malformed line ends it like a failed connection."""

    def __init__(self, content: aiohttp.StreamReader, is_known: IsKnown, *, is_expired: bool) -> None:
        super().__init__(content)
        self._is_known, self._is_expired = is_known, is_expired

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        if self._is_expired:
            yield _EXPIRED
            return
        async for lines in read_line_batches(self._content.iter_chunked(size)):
            converted = b"".join(_convert_event(line, self._is_known) for line in lines)
            if converted:
                yield converted


def _convert_event(line: bytes, is_known: IsKnown) -> bytes:
    """Return the line that kopf gets for a line of a watch; nothing for a change to a version that is known already.

    Raises ClientPayloadError if the line is malformed or reports an error other than 410.
    """
    try:
        event = decode_json(line, _Event, subject="an event")
        reported = decode_json(line, _ErrorEvent, subject="an event").object if event.type == "ERROR" else None
    except DocumentError as error:
        raise aiohttp.ClientPayloadError(str(error)) from error
    if reported is not None:
        if reported.code == 410:
            return _EXPIRED
        raise aiohttp.ClientPayloadError(f"{reported.code} {reported.reason}: {reported.message}")
    metadata = event.object.metadata
    if event.type == "MODIFIED" and is_known(
        metadata.get("namespace", ""), metadata.get("name", ""), metadata.get("resourceVersion", "")
    ):
        return b""
    return msgspec.json.encode({"type": event.type, "object": _convert_run(event.object)}) + b"\n"


def _convert_page(page: _Page) -> bytes:
    listed = {"apiVersion": names.API_VERSION, "kind": f"{names.KIND}List", "metadata": page.metadata}
    return msgspec.json.encode(listed | {"items": [_convert_run(run) for run in page.items or ()]})


def _convert_run(run: _Run) -> KopfObject:
    metadata: Any = {name: run.metadata[name] for name in _KOPF_FIELDS if name in run.metadata}  # type: ignore[literal-required]
    size = len(memoryview(run.spec)) if isinstance(run.spec, msgspec.Raw) else 0
    document = run if size <= MAX_SPEC_BYTES else _LargeRun(run.metadata, size, run.status)
    return {"metadata": metadata, "document": base64.b64encode(msgspec.json.encode(document)).decode("ascii")}
