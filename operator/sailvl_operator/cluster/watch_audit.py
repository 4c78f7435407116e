"""Audits the watch of runs: compares a list with the store, and replays what the watch missed.

A watch can go silent without an error. Each round lists the resourceVersions of all runs (metadata only). A version
that was listed a round ago and is still not in the store was missed; the run is read and handled like a watch event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.runs import RunKey, RunStore, RunVersion, key_of
from sailvl_operator.errors import ApiError, NotFound

log = logging.getLogger(__name__)

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with the type of a watch event and the object."""


class WatchAuditor:
    """Audits the watch that fills `runs`.

    `namespaces`: namespaces to list; empty: all. `interval_seconds`: time between rounds; 0 disables them. `on_event`:
    handles a missed event; `count`: called once for each. `count_error`: called for each that can't be handled.
    """

    def __init__(
        self,
        client: Client,
        runs: RunStore,
        *,
        namespaces: tuple[str, ...],
        interval_seconds: float,
        on_event: OnEvent,
        count: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._runs = runs
        self._scopes = namespaces or ("",)
        self._interval_seconds = interval_seconds
        self._on_event = on_event
        self._count = count
        self._monotonic = monotonic
        self._count_error = count_error
        self._listed: dict[RunKey, int] = {}  # resourceVersions of the previous round
        self._stored: dict[RunKey, RunVersion] = {}  # runs in the store after the previous round
        self._clean_rounds = 0
        self._stale_since: float | None = None

    async def run(self) -> None:
        """Audit in rounds until cancelled."""
        if not self._interval_seconds:
            return
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.check_once()
            except ApiError as error:
                log.info("watch audit skipped, runs not listed: %s", error)

    def stale_seconds(self) -> float:
        """Return for how long the watch has been missing events; 0 if it is healthy."""
        return 0.0 if self._stale_since is None else self._monotonic() - self._stale_since

    async def check_once(self) -> None:
        """Audit one round."""
        listed_before, stored_before = self._listed, self._stored
        self._listed = await self._list_versions()
        missed = [
            key for key, version in listed_before.items() if key in self._listed and self._is_behind(key, version)
        ]
        deleted = [
            (key, known.uid)
            for key, known in stored_before.items()
            if self._was_deletion_missed(key, known.uid, listed_before)
        ]
        for key in missed:
            await self._replay_change(key)
        for (namespace, name), uid in deleted:
            self._replay("DELETED", {"metadata": {"namespace": namespace, "name": name, "uid": uid}})
        self._stored = self._runs.versions()
        self._update_staleness(is_clean=not missed and not deleted)

    def _update_staleness(self, *, is_clean: bool) -> None:
        """Declare the watch stale if it missed something, and healthy after two clean rounds. A single one doesn't
        suffice, since a replayed event can't be missed again in the next round."""
        self._clean_rounds = self._clean_rounds + 1 if is_clean else 0
        if self._clean_rounds >= 2:
            self._stale_since = None
        elif not is_clean and self._stale_since is None:
            self._stale_since = self._monotonic()

    async def _list_versions(self) -> dict[RunKey, int]:
        versions: dict[RunKey, int] = {}
        for scope in self._scopes:
            pages = self._client.list_pages(resources.RUNS, scope, metadata_only=True, decode_as=resources.Versioned)
            async for page in pages:
                versions |= {key_of(item): int(item["metadata"]["resourceVersion"]) for item in page.items}
        return versions

    def _is_behind(self, key: RunKey, version: int) -> bool:
        known = self._runs.get_version(key)
        return known is None or known.version < version

    def _was_deletion_missed(self, key: RunKey, uid: str, listed_before: dict[RunKey, int]) -> bool:
        """Whether a run is missing from this list and the previous one, but is still in the store."""
        known = self._runs.get_version(key)
        is_stored = known is not None and known.uid == uid
        return is_stored and key not in listed_before and key not in self._listed

    async def _replay_change(self, key: RunKey) -> None:
        try:
            self._replay("MODIFIED", await self._client.get(resources.RUNS, *key, decode_as=resources.SailVLRun))
        except NotFound:
            return  # the next round finds the deletion

    def _replay(self, type_: str, raw: dict[str, Any]) -> None:
        self._count()
        log.warning("watch of runs missed an event, replaying it", extra={"type": type_, "key": "/".join(key_of(raw))})
        with contain_errors("watch-audit", self._count_error, subject="/".join(key_of(raw))):
            self._on_event(type_, raw)
