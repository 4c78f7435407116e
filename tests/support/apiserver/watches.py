"""One open watch: which events of a store belong to it, whatever carries them to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from tests.support.apiserver.objects import Object, matches_labels, parse_selector
from tests.support.apiserver.store import ObjectStore, WatchEvent, encode_event

_DEFAULT_TIMEOUT_SECONDS = 300.0


class Watch:
    """Collects the lines that its client should read next; subclasses decide when and how they are sent."""

    def __init__(self, store: ObjectStore, plural: str, query: Mapping[str, str], *, namespace: str = "") -> None:
        self.store, self.plural, self.namespace = store, plural, namespace
        self.timeout_seconds = float(query.get("timeoutSeconds", _DEFAULT_TIMEOUT_SECONDS))
        self.has_news = asyncio.Event()
        self.is_expired = False
        """Whether the version to start from was compacted before the watch was opened."""
        self._since = int(query.get("resourceVersion") or 0)
        self._wanted = parse_selector(query.get("labelSelector", ""))

    def open(self) -> None:
        """Queue the events since the client's version, or an Expired error, and follow the store from now on."""
        self.store.listeners.append(self._offer)
        self.is_expired = self._since < self.store.oldest_version
        if self.is_expired:
            self.queue_line(_build_expired())
        for event in self.store.history:
            self._offer(event)

    def close(self) -> None:
        """Stop following the store."""
        self.store.listeners.remove(self._offer)

    def queue_line(self, line: bytes) -> None:
        """Take the next line for the client."""
        raise NotImplementedError

    def build_bookmark(self, version: int) -> bytes:
        """Return a BOOKMARK event: it carries an empty object, with nulls where others have
        times and lists, as the API server sends it.
        """
        pod: Object = {"metadata": {"creationTimestamp": None}, "spec": {"containers": None}}
        empty: Object = {"pods": {"spec": pod["spec"]}, "jobs": {"spec": {"template": pod}}}.get(self.plural, {})
        metadata = {"resourceVersion": str(version), "creationTimestamp": None}
        return encode_event("BOOKMARK", empty | {"metadata": metadata, "status": {}})

    def _offer(self, event: WatchEvent) -> None:
        if (
            event.version > self._since
            and event.plural == self.plural
            and self.namespace in ("", event.namespace)
            and matches_labels(self._wanted, event.labels)
        ):
            self.queue_line(event.line)
            self.has_news.set()


def _build_expired() -> bytes:
    error = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
    return encode_event("ERROR", error)
