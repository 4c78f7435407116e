"""Looks now and then whether the watch of runs has told of every change, and makes up for what it missed.

A watch can fall silent without an error. Here the runs' versions are listed (metadata only): one that was listed a
round ago and is still not known was missed; it is read, and counts as told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from sailvl_operator.api.types import Run
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.runs import RunKey, RunStore, key_of
from sailvl_operator.errors import ApiError, NotFound

log = logging.getLogger(__name__)

Tell = Callable[[str, dict[str, Any]], None]
"""Called with the type of a watch event and the object."""


class WatchAuditor:
    """One for the process; the runs' store says what is known."""

    def __init__(
        self,
        client: Client,
        runs: RunStore,
        *,
        namespaces: tuple[str, ...],
        interval: float,
        tell: Tell,
        count: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._runs = runs
        self._scopes = namespaces or ("",)
        self._interval = interval
        self._tell = tell
        self._count = count
        self._monotonic = monotonic
        self._listed: dict[RunKey, int] = {}  # versions, a round ago
        self._known: list[Run] = []  # a round ago
        self._clean_rounds = 0
        self._deaf_since: float | None = None

    async def run(self) -> None:
        """Rounds, until cancelled; 0 seconds between them: none."""
        if not self._interval:
            return
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except ApiError as error:
                log.info("the runs could not be listed: %s", error)

    def stale_seconds(self) -> float:
        """Seconds for which no two rounds in a row found that the watch had missed nothing."""
        return 0.0 if self._deaf_since is None else self._monotonic() - self._deaf_since

    async def look(self) -> None:
        """One round."""
        before, known = self._listed, self._known
        self._listed = await self._list()
        missed = [key for key, version in before.items() if key in self._listed and self._is_behind(key, version)]
        gone = [run for run in known if _key(run) not in before and _key(run) not in self._listed and self._has(run)]
        for key in missed:
            await self._make_up(key)
        for run in gone:
            self._tell_missed("DELETED", {"metadata": {"namespace": run.namespace, "name": run.name, "uid": run.uid}})
        self._known = [entry.run for entry in self._runs]
        self._judge(is_clean=not missed and not gone)

    def _judge(self, *, is_clean: bool) -> None:
        """What was just made up for isn't missed in the round after: two clean rounds say that it hears again."""
        self._clean_rounds = self._clean_rounds + 1 if is_clean else 0
        if self._clean_rounds >= 2:
            self._deaf_since = None
        elif not is_clean and self._deaf_since is None:
            self._deaf_since = self._monotonic()

    async def _list(self) -> dict[RunKey, int]:
        found: dict[RunKey, int] = {}
        for scope in self._scopes:
            async for items, _ in self._client.list_pages(resources.RUNS, scope, metadata_only=True):
                found |= {key_of(item): int(item["metadata"]["resourceVersion"]) for item in items}
        return found

    def _is_behind(self, key: RunKey, version: int) -> bool:
        known = self._runs.get(key)
        return known is None or int(known.run.resource_version) < version

    def _has(self, run: Run) -> bool:
        known = self._runs.get(_key(run))
        return known is not None and known.run.uid == run.uid

    async def _make_up(self, key: RunKey) -> None:
        try:
            self._tell_missed("MODIFIED", await self._client.get(resources.RUNS, *key))
        except NotFound:
            return  # the next round sees that it is gone

    def _tell_missed(self, type_: str, raw: dict[str, Any]) -> None:
        self._count()
        log.warning("the watch of runs has missed a change", extra={"type": type_, "key": "/".join(key_of(raw))})
        self._tell(type_, raw)


def _key(run: Run) -> RunKey:
    return run.namespace, run.name
