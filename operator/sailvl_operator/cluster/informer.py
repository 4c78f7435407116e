"""Informer of one kind: lists and watches its objects and keeps a store of their records up to date.

`owned_objects.py` runs one for each kind of owned object and namespace.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic

from sailvl_operator.api import names
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.record_store import Kind, Record, Store
from sailvl_operator.cluster.watch_stream import EventType, Object
from sailvl_operator.errors import ApiError, Forbidden, Gone

log = logging.getLogger(__name__)

_BACKOFF_LIMIT_SECONDS = 10.0
"""Longest average wait before a broken watch is resumed: how late changes are seen after an outage."""


class Informer(Generic[Record]):
    """Keeps a store up to date while `run` runs.

    `namespace`: the namespace to watch; empty: all. `count_restart`: called with resource and cause of each restart.
    `count_error`: called for each object that can't be parsed; the others are not affected.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind[Record],
        store: Store[Record],
        *,
        namespace: str = "",
        count_restart: Callable[[str, str], None],
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._kind = kind
        self._store = store
        self.namespace = namespace
        self._count_restart = count_restart
        self._count_error = count_error
        self._last_received_at = time.monotonic()
        self._version = ""
        self._failures = 0
        self.synced = asyncio.Event()
        """Set once the first list is stored."""
        self.answered = asyncio.Event()
        """Set once the first list is stored or was forbidden."""
        self.missing_permission = ""
        """Which verb on which resource is forbidden, and what to grant; empty if none is."""
        self.resource = kind.resource.plural

    def silent_seconds(self) -> float:
        """Return the seconds since the last data of the list or the watch, bookmarks included."""
        return time.monotonic() - self._last_received_at

    async def run(self) -> None:
        """List, then watch; resume the watch when it ends, and list again when its resourceVersion has expired. Return
        only on cancellation."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                self.missing_permission = ""
                self._count_restart(self.resource, "timeout")
            except Gone:
                self._version = ""
                self._failures += 1
                self._count_restart(self.resource, "expired")
            except Forbidden as error:
                self._failures += 1
                self._count_restart(self.resource, "forbidden")
                self._report_missing_permission("watch" if self._version else "list", error)
            except ApiError as error:
                self._failures += 1
                self._count_restart(self.resource, "error")
                log.warning("watch of %s failed, resuming: %s", self.resource, error)
            backoff = min(0.1 * 2.0 ** min(self._failures, 10), _BACKOFF_LIMIT_SECONDS)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))

    async def _list(self) -> None:
        records: list[Record] = []
        version, known = "", self._store.uids(self.namespace)
        pages = self._client.list_pages(
            self._kind.resource, self.namespace, selector=names.MANAGED_SELECTOR, decode_as=self._kind.decode_as
        )
        async for items, version in pages:  # noqa: B007  # the last page's is used
            self._last_received_at = time.monotonic()
            for raw in items:
                known.discard(raw["metadata"]["uid"])  # keeps the last record of an object that can't be parsed
                with self._contain_errors(raw):
                    records.append(self._kind.parse(raw))
        self._store.replace_all(records, namespace=self.namespace, known=known)
        self._version = version
        self.missing_permission = ""
        self.synced.set()
        self.answered.set()

    async def _watch(self) -> None:
        events = self._client.watch(
            self._kind.resource,
            self.namespace,
            selector=names.MANAGED_SELECTOR,
            resource_version=self._version,
            decode_as=self._kind.decode_as,
        )
        async for type_, raw in events:
            self._last_received_at = time.monotonic()
            self.missing_permission = ""
            self._version = raw["metadata"]["resourceVersion"]
            self._failures = 0
            with self._contain_errors(raw):
                self._handle(type_, raw)

    def _report_missing_permission(self, verb: str, error: Forbidden) -> None:
        """Log once which permission is missing. The answer counts as data: a restart wouldn't help."""
        self._last_received_at = time.monotonic()
        group, _, _ = self._kind.resource.api_version.rpartition("/")
        scope = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        message = (
            f"not permitted to {verb} {self.resource} {scope}; grant the operator's role the verbs list and watch on "
            f"{self.resource} of the API group {group or 'core'}"
        )
        if message != self.missing_permission:
            log.error("%s: %s", message, error, extra={"resource": self.resource})
        self.missing_permission = message
        self.answered.set()

    def _contain_errors(self, raw: Object) -> AbstractContextManager[None]:
        subject = f"{self.resource} {raw['metadata'].get('namespace', '')}/{raw['metadata'].get('name', '')}"
        return contain_errors(f"informer-{self.resource}", self._count_error, subject=subject)

    def _handle(self, type_: EventType, raw: Object) -> None:
        if type_ == "DELETED":
            self._store.delete(raw)
        elif type_ != "BOOKMARK":
            self._store.put_watched(raw)
