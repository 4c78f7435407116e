"""Asynchronous client of the API server: the verbs that the operator uses, on dicts, with retries.

Built on aiohttp and msgspec, because it is the operator's hot path. Errors are those of `errors.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from yarl import URL

from sailvl_operator.api import names
from sailvl_operator.api.untrusted import DocumentError, clean_line, decode_json
from sailvl_operator.cluster.credentials import Credentials, build_connector
from sailvl_operator.cluster.page_limit import Page, PageItems, PageLimit, PageTooLargeError, RawPage, read_page
from sailvl_operator.cluster.resources import Ignored, ObjectType, Resource
from sailvl_operator.cluster.server_clock import ServerClock
from sailvl_operator.cluster.watch_stream import Object, WatchEvent, decode_event, read_line_batches
from sailvl_operator.errors import ApiError, TooManyRequests, Unauthorized, Unreachable, error_from_status

MERGE_PATCH = "application/merge-patch+json"
WATCH_SILENCE_SECONDS = 90.0
"""A watch without data for this long is broken; the API server sends a bookmark about once a minute."""

_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_TRANSIENT_STATUSES = frozenset({0, 429, 500, 502, 503, 504})
_RETRY_LIMIT_SECONDS = 30.0

OnResponse = Callable[[str, int], None]
"""Called with the verb and the HTTP status of each request; the status is 0 if there was no response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Limits of a client. The operator runs with the defaults."""

    connections: int = 64
    """Maximum number of open connections, watches included."""
    request_timeout_seconds: float = 30.0
    """Timeout of one request in seconds; watches have none."""
    max_tries: int = 4
    """Number of tries of a request that fails for a transient reason: no response, 429 or 5xx."""
    backoff_seconds: float = 0.2
    """Backoff before the second try. It doubles with each further try and is jittered by half."""
    page_size: int = 500
    """Maximum number of objects per page of a list; of large objects, a page has fewer (`page_limit.py`)."""
    watch_timeout_seconds: int = 300
    """Seconds after which the API server ends a watch."""


class Client:
    """Client of one cluster; an asynchronous context manager.

    `clock`: follows the Date headers of all responses.
    """

    def __init__(
        self,
        credentials: Credentials,
        config: ClientConfig | None = None,
        *,
        clock: ServerClock | None = None,
        on_response: OnResponse = lambda _verb, _status: None,
    ) -> None:
        self._credentials = credentials
        self._config = config or ClientConfig()
        self._clock = clock or ServerClock()
        self._on_response = on_response
        self._session: aiohttp.ClientSession
        self.may_write: Callable[[], bool] = lambda: True
        """Checked before each try of a write. `lease.py` sets it to return False once another replica may lead."""

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=build_connector(self._credentials, limit=self._config.connections),
            timeout=aiohttp.ClientTimeout(total=self._config.request_timeout_seconds),
            headers={"User-Agent": names.FIELD_MANAGER},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, resource: Resource, namespace: str, name: str, *, decode_as: ObjectType = dict) -> Object:
        """Return one object. Raises NotFound."""
        return await self._send_with_retries("get", "GET", resource.path(namespace, name), decode_as=decode_as)

    async def check_exists(self, resource: Resource, namespace: str = "") -> None:
        """Request one object of a resource. Raises NotFound if the API server doesn't have the resource."""
        path = resource.path(namespace)
        await self._send_with_retries("list", "GET", path, {"limit": "1"}, accept=_METADATA, decode_as=Ignored)

    async def list_pages(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        decode_as: ObjectType = dict,
    ) -> AsyncIterator[Page]:
        """Yield the pages of a list; without a namespace, of all namespaces.

        `metadata_only`: request PartialObjectMetadata. `decode_as`: type of the objects; other fields are skipped.
        Raises Gone if reading takes so long that the list's snapshot expires; the caller starts over.
        """
        parameters = {"labelSelector": selector, "fieldSelector": field_selector}
        path, limit = resource.path(namespace), PageLimit(self._config.page_size)
        accept = _METADATA if metadata_only else _JSON
        while True:
            page = await self._read_page(path, parameters, limit, accept)
            metadata, items = page["metadata"], page.pop("items", None) or ()
            yield Page(PageItems(items, decode_as, subject=f"list {path}"), metadata["resourceVersion"])
            if not metadata.get("continue"):
                return
            parameters["continue"] = metadata["continue"]

    async def _read_page(self, path: str, parameters: Mapping[str, str], limit: PageLimit, accept: str) -> Object:
        """Return a page of at most `limit` objects, and of fewer if they are too large."""
        while True:
            query = {"limit": str(limit.objects), **parameters}
            try:
                return await self._send_with_retries(
                    "list", "GET", path, query, accept=accept, decode_as=RawPage, limit=limit
                )
            except PageTooLargeError:
                limit.shrink()

    async def watch(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        selector: str = "",
        resource_version: str,
        decode_as: ObjectType = dict,
    ) -> AsyncIterator[WatchEvent]:
        """Yield the events after a resourceVersion until the API server ends the watch. There are no retries: the
        caller resumes the watch.

        Raises Gone if the resourceVersion is too old; the caller lists again.
        """
        parameters = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(self._config.watch_timeout_seconds),
        }
        path = resource.path(namespace)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_SILENCE_SECONDS)
        try:
            async with self._session.get(
                self._build_url(path, parameters), timeout=timeout, headers=await self._credentials.headers()
            ) as response:
                self._on_response("watch", response.status)
                if response.status != 200:
                    raise self._build_error(response, await response.read(), f"watch {path}")
                async for lines in read_line_batches(response.content.iter_any()):
                    for line in lines:
                        yield decode_event(line, path, decode_as)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"watch {path}: {error or type(error).__name__}") from error

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, decode_as: ObjectType = dict
    ) -> Object:
        """POST an object. If a response was lost, the retry raises Conflict, so the caller has to check whether the
        existing object is its own."""
        path = resource.path(namespace)
        return await self._send_with_retries("create", "POST", path, _field_manager(), body=body, decode_as=decode_as)

    async def replace(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]) -> Object:
        """PUT a whole object. Raises Conflict if its resourceVersion is stale."""
        path = resource.path(namespace, name)
        return await self._send_with_retries("update", "PUT", path, _field_manager(), body=body)

    async def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: Mapping[str, Any],
        *,
        subresource: str = "",
        decode_as: ObjectType = dict,
    ) -> Object:
        """Apply a JSON merge patch. A resourceVersion or UID in its metadata is a precondition; raises Conflict."""
        path = resource.path(namespace, name, subresource)
        return await self._send_with_retries(
            "patch", "PATCH", path, _field_manager(), body=body, content_type=MERGE_PATCH, decode_as=decode_as
        )

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, version: str = "") -> None:
        """Delete the object with this UID, and its dependents in the background. With `version`, delete it only if its
        resourceVersion is unchanged. Raises NotFound or Conflict."""
        preconditions = {"uid": uid} | ({"resourceVersion": version} if version else {})
        body = {"propagationPolicy": "Background", "preconditions": preconditions}
        await self._send_with_retries("delete", "DELETE", resource.path(namespace, name), body=body, decode_as=Ignored)

    async def delete_collection(
        self, resource: Resource, namespace: str, *, selector: str, grace_seconds: int | None = None
    ) -> None:
        """Delete all objects that match a label selector."""
        body = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        parameters = {"labelSelector": selector}
        path = resource.path(namespace)
        await self._send_with_retries("deletecollection", "DELETE", path, parameters, body=body, decode_as=Ignored)

    async def _send_with_retries(
        self,
        verb: str,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        decode_as: ObjectType = dict,
        limit: PageLimit | None = None,
    ) -> Object:
        url, data = self._build_url(path, parameters or {}), None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept} | ({} if data is None else {"Content-Type": content_type})
        failures = 0
        while True:
            try:
                return await self._send_once(verb, method, url, decode_as, data=data, headers=headers, limit=limit)
            except ApiError as error:
                failures += 1
                if not self._should_retry(error, failures):
                    raise
                await asyncio.sleep(self._retry_seconds(error, failures))

    async def _send_once(
        self,
        verb: str,
        method: str,
        url: URL,
        decode_as: ObjectType,
        *,
        headers: dict[str, str],
        data: bytes | None,
        limit: PageLimit | None,
    ) -> Object:
        path = url.raw_path
        headers = headers | await self._credentials.headers()
        if method != "GET" and not self.may_write():
            raise ApiError(f"{verb} {path}: not sent: the lease of this replica has expired", status=409)
        sent = self._clock.monotonic()
        try:
            async with self._session.request(method, url, headers=headers, data=data) as response:
                self._on_response(verb, response.status)
                self._clock.observe_date(response.headers.get("Date"), sent=sent, received=self._clock.monotonic())
                answer = await (response.read() if limit is None else read_page(response, limit.max_bytes))
        except (aiohttp.ClientError, TimeoutError) as error:
            self._on_response(verb, 0)
            raise Unreachable(f"{verb} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise self._build_error(response, answer, f"{verb} {path}")
        try:
            decoded: Object = decode_json(answer, decode_as, subject="the response")
        except DocumentError as error:
            raise Unreachable(f"{verb} {path}: {error}") from error
        if limit is not None:
            limit.grow(len(answer))
        return decoded

    def _build_url(self, path: str, parameters: Mapping[str, str]) -> URL:
        return _encode_url(self._credentials.server + path, urlencode(parameters))

    def _build_error(self, response: aiohttp.ClientResponse, answer: bytes | bytearray, request: str) -> ApiError:
        try:
            body = decode_json(answer, dict, subject="the response")
        except DocumentError:
            body = {"message": clean_line(answer[:200].decode(errors="replace"), 200)}
        if response.status == 401:
            self._credentials.forget()
        retry_after = response.headers.get("Retry-After")
        return error_from_status(response.status, body, request=request, retry_after=retry_after)

    def _should_retry(self, error: ApiError, failures: int) -> bool:
        if isinstance(error, Unauthorized):
            return failures == 1
        return error.status in _TRANSIENT_STATUSES and failures < self._config.max_tries

    def _retry_seconds(self, error: ApiError, failures: int) -> float:
        if isinstance(error, Unauthorized):
            return 0.0
        retry_after = error.retry_after if isinstance(error, TooManyRequests) else 0.0
        backoff = self._config.backoff_seconds * 2.0 ** (failures - 1) * random.uniform(0.5, 1.5)
        return min(max(retry_after, backoff), _RETRY_LIMIT_SECONDS)


@lru_cache(maxsize=1024)  # the same few URLs make up most requests
def _encode_url(address: str, query: str) -> URL:
    path = quote(address, safe="/:[]%")
    return URL(f"{path}?{query}" if query else path, encoded=True)


def _field_manager() -> dict[str, str]:
    return {"fieldManager": names.FIELD_MANAGER}
