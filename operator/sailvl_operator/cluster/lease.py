"""Leader election with a coordination.k8s.io Lease: only the holder reconciles, and a process that loses it exits.

As in client-go, another replica's Lease counts as expired if it has not changed for its duration, measured by our own
monotonic clock. The clocks of the replicas need not agree.
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
from sailvl_operator.errors import ApiError, Conflict, LeaseLost, NotFound
from sailvl_operator.settings import LeaseSettings

log = logging.getLogger(__name__)

_RELEASE_TIMEOUT_SECONDS = 2.0


class Leadership:
    """One candidate for the Lease. `clock`: Unix seconds, for the times written to it."""

    def __init__(
        self,
        client: Client,
        settings: LeaseSettings,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._settings = settings
        self._clock = clock
        self._monotonic = monotonic
        self._lease: dict[str, Any] = {}
        self._observed_version = ""
        self._observed_at = 0.0
        self._renewed_at = float("-inf")
        self.is_leading = False

    async def acquire(self) -> None:
        """Wait until this process holds the Lease."""
        while not await self._try_to_acquire():
            await asyncio.sleep(self._settings.renew_interval_seconds)
        self.is_leading = True
        self._client.may_write = self._may_write
        log.info("became leader", extra={"identity": self._settings.identity})

    async def keep(self) -> None:
        """Renew the Lease until cancelled.

        Raises LeaseLost if another replica holds it, or if renewals failed for the renew deadline.
        """
        while True:
            interval = self._settings.renew_interval_seconds
            await asyncio.sleep(max(self._renewed_at + interval - self._monotonic(), interval / 10))
            try:
                async with asyncio.timeout(max(self._seconds_left(), 0.0)):
                    await self._renew()
            except (ApiError, TimeoutError) as error:
                if self._seconds_left() <= 0:
                    self._give_up(f"lease not renewed for {self._settings.renew_deadline_seconds:g} s: {error!r}")

    async def release(self) -> None:
        """Clear the holder at a clean exit, so that another replica takes over at once. Errors are logged."""
        if not self.is_leading:
            return
        self.is_leading = False
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_SECONDS):
                await self._update_ours(holder="", duration=1)
        except (ApiError, TimeoutError) as error:
            log.warning("lease not released, it will expire: %r", error)

    def _seconds_left(self) -> float:
        """Return the seconds until the renew deadline, which is before any other replica may take the Lease."""
        return self._renewed_at + self._settings.renew_deadline_seconds - self._monotonic()

    def _may_write(self) -> bool:
        """Whether we certainly hold the Lease. This also holds right after the process was paused for a long time,
        before `keep` runs again."""
        return self._seconds_left() > 0

    def _give_up(self, message: str) -> NoReturn:
        self.is_leading = False
        self._renewed_at = float("-inf")
        raise LeaseLost(message)

    async def _renew(self) -> None:
        requested_at = self._monotonic()
        try:
            self._lease = await self._update_ours(holder=self._settings.identity)
        except (Conflict, NotFound) as error:
            self._give_up(f"lease taken by another replica, or about to be: {error}")
        self._renewed_at = requested_at  # other replicas start to count later than this

    async def _update_ours(self, *, holder: str, duration: float | None = None) -> dict[str, Any]:
        """Update the Lease that we hold. If a conflict was caused by an earlier write of ours whose response was lost,
        update it again."""
        while True:
            try:
                return await self._update(self._lease, holder=holder, duration=duration)
            except Conflict:
                lease = await self._read()
                if lease is None or lease.get("spec", {}).get("holderIdentity") != self._settings.identity:
                    raise
                self._lease = lease

    async def _try_to_acquire(self) -> bool:
        requested_at = self._monotonic()
        try:
            lease = await self._read()
            if lease is None:
                self._lease = await self._create()
            elif self._may_take(lease):
                self._lease = await self._update(lease, holder=self._settings.identity)
            else:
                return False
        except ApiError as error:
            log.info("lease not acquired, retrying: %s", error)
            return False
        self._renewed_at = requested_at
        return True

    async def _read(self) -> dict[str, Any] | None:
        try:
            return await self._client.get(resources.LEASES, self._settings.namespace, self._settings.name)
        except NotFound:
            return None

    def _may_take(self, lease: dict[str, Any]) -> bool:
        """Whether the Lease has no other holder, or has expired."""
        spec, version = lease.get("spec", {}), lease["metadata"]["resourceVersion"]
        if spec.get("holderIdentity") in (None, "", self._settings.identity):
            return True
        if version != self._observed_version:
            self._observed_version, self._observed_at = version, self._monotonic()
        duration = float(spec.get("leaseDurationSeconds", self._settings.duration_seconds))
        return self._monotonic() - self._observed_at > duration

    async def _create(self) -> dict[str, Any]:
        metadata = {"name": self._settings.name, "namespace": self._settings.namespace}
        lease = {"apiVersion": resources.LEASES.api_version, "kind": "Lease", "metadata": metadata}
        body = lease | {"spec": self._build_spec({}, self._settings.identity, self._settings.duration_seconds)}
        return await self._client.create(resources.LEASES, self._settings.namespace, body)

    async def _update(self, lease: dict[str, Any], *, holder: str, duration: float | None = None) -> dict[str, Any]:
        spec = self._build_spec(lease.get("spec", {}), holder, duration or self._settings.duration_seconds)
        return await self._client.replace(
            resources.LEASES, self._settings.namespace, self._settings.name, lease | {"spec": spec}
        )

    def _build_spec(self, old: dict[str, Any], holder: str, duration: float) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        is_same = old.get("holderIdentity") == holder
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(duration)),
            "acquireTime": old.get("acquireTime", now) if is_same else now,
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (not is_same),
        }
