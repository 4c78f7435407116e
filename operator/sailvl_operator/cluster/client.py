"""A small asynchronous client of the API server: the verbs that the operator uses, on dicts, with retries.

The hot path is aiohttp and msgspec; every request is counted by verb and code. Errors are those of `errors.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, TypedDict, cast
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from yarl import URL

from sailvl_operator.api import names
from sailvl_operator.cluster import gulps
from sailvl_operator.cluster.credentials import Credentials, build_connector
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.cluster.server_clock import ServerClock
from sailvl_operator.cluster.wire import Shape
from sailvl_operator.errors import ApiError, Gone, TooManyRequests, Unauthorized, Unreachable, api_error
from sailvl_operator.settings import ApiSettings

Object = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]

MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_PASSING = frozenset({0, 429, 500, 502, 503, 504})
_RETRY_AFTER_LIMIT = 30.0
SILENCE = 90.0
"""Seconds without a byte after which a watch counts as broken; bookmarks come about once a minute."""

Count = Callable[[str, int], None]
"""Called with verb and HTTP code, 0 when no answer came."""


class Client:
    """One cluster. Use as an asynchronous context manager."""

    def __init__(self, credentials: Credentials, settings: ApiSettings, count: Count) -> None:
        self._credentials = credentials
        self._settings = settings
        self._count = count
        self._session: aiohttp.ClientSession
        self.clock = ServerClock()
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before each try of a write; `lease.py` says no once another replica may lead."""

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=build_connector(self._credentials, limit=self._settings.connections),
            timeout=aiohttp.ClientTimeout(total=self._settings.request_timeout),
            headers={"User-Agent": names.FIELD_MANAGER},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object."""
        return await self._request("get", "GET", resource.path(namespace, name))

    async def list_pages(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        shape: Shape = dict,
    ) -> AsyncIterator[tuple[list[Object], str]]:
        """Pages of objects, or of their metadata alone, each with the list's resourceVersion; no more of an object than
        its shape has.

        Raises Gone when the list takes so long that its snapshot expires: start again.
        """
        parameters = {
            "limit": str(self._settings.page_size),
            "labelSelector": selector,
            "fieldSelector": field_selector,
        }
        while True:
            accept = _METADATA if metadata_only else _JSON
            page = await self._request(
                "list", "GET", resource.path(namespace), parameters, accept=accept, shape=_page_of(shape)
            )
            metadata = page["metadata"]
            yield page.get("items") or [], metadata["resourceVersion"]
            if not metadata.get("continue"):
                return
            parameters["continue"] = metadata["continue"]

    async def watch(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        selector: str = "",
        resource_version: str,
        shape: Shape = dict,
    ) -> AsyncIterator[tuple[EventType, Object]]:
        """Events after a resourceVersion, until the server's timeout. Not retried: the caller resumes or lists again.

        Raises Gone when the resourceVersion is too old.
        """
        parameters = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(self._settings.watch_timeout),
        }
        path, timeout = resource.path(namespace), aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE)
        try:
            async with self._session.get(
                self._url(path, parameters), timeout=timeout, headers=await self._credentials.headers()
            ) as response:
                self._count("watch", response.status)
                if response.status != 200:
                    raise self._fail(response, await response.read(), f"watch {path}")
                async for line in _lines(response.content):
                    yield _decode_event(line, path, shape)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"watch {path}: {error or type(error).__name__}") from error

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, shape: Shape = dict
    ) -> Object:
        """POST; the answer has no more than its shape. After a lost answer the retry meets a Conflict: whoever calls
        compares the owner."""
        return await self._request("create", "POST", resource.path(namespace), _manager(), body=body, shape=shape)

    async def replace(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]) -> Object:
        """PUT of a whole object; its resourceVersion guards against others."""
        return await self._request("update", "PUT", resource.path(namespace, name), _manager(), body=body)

    async def server_side_apply(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]) -> Object:
        """Apply our fields; takes them over from other managers."""
        parameters = _manager() | {"force": "true"}
        path = resource.path(namespace, name)
        return await self._request("apply", "PATCH", path, parameters, body=body, content_type=APPLY_PATCH)

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str = ""
    ) -> Object:
        """Merge patch; a resourceVersion or uid in its metadata is a precondition."""
        path = resource.path(namespace, name, subresource)
        return await self._request("patch", "PATCH", path, _manager(), body=body, content_type=MERGE_PATCH)

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, version: str = "") -> None:
        """Delete this very object, its dependents in the background; `version`: only as long as it is unchanged.
        Conflict: the name is another object's by now, or it was changed."""
        preconditions = {"uid": uid} | ({"resourceVersion": version} if version else {})
        body = {"propagationPolicy": "Background", "preconditions": preconditions}
        await self._request("delete", "DELETE", resource.path(namespace, name), body=body)

    async def delete_collection(
        self, resource: Resource, namespace: str, *, selector: str, grace_seconds: int | None = None
    ) -> None:
        """Delete all objects of a label selector."""
        body = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        parameters = {"labelSelector": selector}
        await self._request("deletecollection", "DELETE", resource.path(namespace), parameters, body=body)

    async def _request(
        self,
        verb: str,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        shape: Shape = dict,
    ) -> Object:
        url, data = self._url(path, parameters or {}), None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept} | ({} if data is None else {"Content-Type": content_type})
        failures = 0
        while True:
            try:
                return await self._try(verb, method, url, shape, data=data, headers=headers)
            except ApiError as error:
                failures += 1
                if not self._is_worth_a_retry(error, failures):
                    raise
                await asyncio.sleep(self._wait(error, failures))

    async def _try(
        self, verb: str, method: str, url: URL, shape: Shape, *, headers: dict[str, str], data: bytes | None
    ) -> Object:
        path = url.raw_path
        headers = headers | await self._credentials.headers()
        if method != "GET" and not self.may_write():
            raise ApiError(f"{verb} {path}: not written: the lease of this replica has run out", status=409)
        sent = self.clock.monotonic()
        try:
            async with self._session.request(method, url, headers=headers, data=data) as response:
                self._count(verb, response.status)
                self.clock.observe_date(response.headers.get("Date"), sent=sent, received=self.clock.monotonic())
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._count(verb, 0)
            raise Unreachable(f"{verb} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise self._fail(response, answer, f"{verb} {path}")
        try:
            decoded: Object = msgspec.json.decode(answer, type=shape)
        except msgspec.MsgspecError as error:
            raise Unreachable(f"{verb} {path}: the answer is broken: {error}") from error
        return decoded

    def _url(self, path: str, parameters: Mapping[str, str]) -> URL:
        return _build_url(self._credentials.server + path, urlencode(parameters))

    def _fail(self, response: aiohttp.ClientResponse, answer: bytes, request: str) -> ApiError:
        try:
            body = msgspec.json.decode(answer, type=dict)
        except msgspec.MsgspecError:
            body = {"message": answer[:200].decode(errors="replace")}
        if response.status == 401:
            self._credentials.forget()
        retry_after = response.headers.get("Retry-After")
        return api_error(response.status, body, request=request, retry_after=retry_after)

    def _is_worth_a_retry(self, error: ApiError, failures: int) -> bool:
        if isinstance(error, Unauthorized):
            return failures == 1
        return error.status in _PASSING and failures < self._settings.tries

    def _wait(self, error: ApiError, failures: int) -> float:
        if isinstance(error, Unauthorized):
            return 0.0
        asked = error.retry_after if isinstance(error, TooManyRequests) else 0.0
        backoff = self._settings.backoff * 2.0 ** (failures - 1) * random.uniform(0.5, 1.5)
        return min(max(asked, backoff), _RETRY_AFTER_LIMIT)


@lru_cache(maxsize=1024)  # most are used again and again
def _build_url(address: str, query: str) -> URL:
    path = quote(address, safe="/:[]%")
    return URL(f"{path}?{query}" if query else path, encoded=True)


def _manager() -> dict[str, str]:
    return {"fieldManager": names.FIELD_MANAGER}


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of any length (readline has a limit that one large object breaks), in gulps."""
    pending = bytearray()
    async for chunk in stream.iter_any():
        pending += chunk
        *lines, rest = pending.split(b"\n")
        for line in lines:
            yield bytes(line)
        pending = bytearray(rest)
        await gulps.pause(len(chunk), is_whole=not rest)


def _decode_event(line: bytes, path: str, shape: Shape) -> tuple[EventType, Object]:
    """Read once; only errors and bookmarks, which needn't be of the shape, are read again: a bookmark's object is an
    empty one, with nulls where others have lists."""
    broken: Exception | None = None
    try:
        event = msgspec.json.decode(line, type=_event_of(shape))
        if event["type"] != "ERROR":
            return cast("EventType", event["type"]), event["object"]
    except msgspec.MsgspecError as error:
        broken = error
    type_, found = _read_shapeless(line)
    if type_ == "BOOKMARK":
        return "BOOKMARK", found
    if type_ != "ERROR":
        raise Unreachable(f"watch {path}: an event is broken: {broken}") from broken
    told = api_error(found.get("code", 500), found, request=f"watch {path}")
    raise Gone(str(told), status=410, reason="Expired") if told.reason == "Expired" else told


def _read_shapeless(line: bytes) -> tuple[str, Object]:
    """Type and object of an event; no type: it is none."""
    try:
        event = msgspec.json.decode(line, type=_event_of(dict))
    except msgspec.MsgspecError:
        return "", {}
    return event["type"], event["object"]


@cache
def _event_of(shape: Shape) -> Any:
    make: Any = TypedDict
    return make("event", {"type": str, "object": shape})


@cache
def _page_of(shape: Shape) -> Any:
    make: Any = TypedDict  # its calls are for type checkers to read, who can't read these
    metadata = make("metadata", {"resourceVersion": str, "continue": str}, total=False)
    return make("page", {"metadata": metadata, "items": list[shape] | None}, total=False)
