"""Leader election by a coordination.k8s.io Lease: only the holder reconciles; who loses it ends its process.

As client-go does, another's lease counts as expired when it has not changed for its duration by our own clock, so
clocks need not agree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.errors import ApiError, Conflict, LostLease, NotFound
from sailvl_operator.settings import LeaseSettings

log = logging.getLogger(__name__)

_RELEASE_SECONDS = 2.0
"""Longer the end of this process doesn't wait for it."""


class Leadership:
    """One candidate."""

    def __init__(
        self,
        client: Client,
        settings: LeaseSettings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._settings = settings
        self._monotonic = monotonic
        self._lease: dict[str, Any] = {}
        self._seen_version = ""
        self._seen_at = 0.0
        self._renewed_at = float("-inf")
        self.is_leading = False

    async def acquire(self) -> None:
        """Return once this process holds the lease."""
        while not await self._try_to_take():
            await asyncio.sleep(self._settings.renew_interval)
        self.is_leading = True
        self._client.may_write = self._may_write
        log.info("this replica leads", extra={"identity": self._settings.identity})

    async def keep(self) -> None:
        """Renew until cancelled.

        Raises LostLease when another replica holds it, or when renewals failed for the deadline.
        """
        while True:
            interval = self._settings.renew_interval
            await asyncio.sleep(max(self._renewed_at + interval - self._monotonic(), interval / 10))
            try:
                async with asyncio.timeout(max(self._left(), 0.0)):
                    await self._renew()
            except (ApiError, TimeoutError) as error:
                if self._left() <= 0:
                    self._lose(f"the lease could not be renewed for {self._settings.renew_deadline} s: {error!r}")

    async def release(self) -> None:
        """Let another replica take over at once; best effort, at a clean end."""
        if not self.is_leading:
            return
        self.is_leading = False
        try:
            async with asyncio.timeout(_RELEASE_SECONDS):
                await self._write_ours(holder="", duration=1)
        except (ApiError, TimeoutError) as error:
            log.warning("the lease was not released and runs out by itself: %r", error)

    def _left(self) -> float:
        """Seconds for which no other replica can think that the lease has run out, with a margin."""
        return self._renewed_at + self._settings.renew_deadline - self._monotonic()

    def _may_write(self) -> bool:
        """Also right after this process stood still for long, when nothing has had a turn yet."""
        return self._left() > 0

    def _lose(self, words: str) -> NoReturn:
        self.is_leading = False
        self._renewed_at = float("-inf")
        raise LostLease(words)

    async def _renew(self) -> None:
        asked_at = self._monotonic()
        try:
            self._lease = await self._write_ours(holder=self._settings.identity)
        except (Conflict, NotFound) as error:
            self._lose(f"another replica took the lease, or may take it: {error}")
        self._renewed_at = asked_at  # others count from a moment after this

    async def _write_ours(self, *, holder: str, duration: float | None = None) -> dict[str, Any]:
        """A conflict need not mean another replica: an earlier write may have been done, and its answer lost."""
        while True:
            try:
                return await self._write(self._lease, holder=holder, duration=duration)
            except Conflict:
                lease = await self._read()
                if lease is None or lease.get("spec", {}).get("holderIdentity") != self._settings.identity:
                    raise
                self._lease = lease

    async def _try_to_take(self) -> bool:
        asked_at = self._monotonic()
        try:
            lease = await self._read()
            if lease is None:
                self._lease = await self._create()
            elif self._is_free(lease):
                self._lease = await self._write(lease, holder=self._settings.identity)
            else:
                return False
        except ApiError as error:
            log.info("the lease is not ours yet: %s", error)
            return False
        self._renewed_at = asked_at
        return True

    async def _read(self) -> dict[str, Any] | None:
        try:
            return await self._client.get(resources.LEASES, self._settings.namespace, self._settings.name)
        except NotFound:
            return None

    def _is_free(self, lease: dict[str, Any]) -> bool:
        spec, version = lease.get("spec", {}), lease["metadata"]["resourceVersion"]
        if spec.get("holderIdentity") in (None, "", self._settings.identity):
            return True
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, self._monotonic()
        duration = float(spec.get("leaseDurationSeconds", self._settings.duration))
        return self._monotonic() - self._seen_at > duration

    async def _create(self) -> dict[str, Any]:
        metadata = {"name": self._settings.name, "namespace": self._settings.namespace}
        lease = {"apiVersion": resources.LEASES.api_version, "kind": "Lease", "metadata": metadata}
        body = lease | {"spec": self._build_spec({}, self._settings.identity, self._settings.duration)}
        return await self._client.create(resources.LEASES, self._settings.namespace, body)

    async def _write(self, lease: dict[str, Any], *, holder: str, duration: float | None = None) -> dict[str, Any]:
        spec = self._build_spec(lease.get("spec", {}), holder, duration or self._settings.duration)
        return await self._client.replace(
            resources.LEASES, self._settings.namespace, self._settings.name, lease | {"spec": spec}
        )

    def _build_spec(self, old: dict[str, Any], holder: str, duration: float) -> dict[str, Any]:
        now = (
            datetime.fromtimestamp(self._client.clock.now(), UTC)
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z")
        )
        is_same = old.get("holderIdentity") == holder
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(duration)),
            "acquireTime": old.get("acquireTime", now) if is_same else now,
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (not is_same),
        }
