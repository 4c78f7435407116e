"""A replica of the operator as a process whose memory and end are observed for the whole time."""

from __future__ import annotations

import asyncio

from bench.operator.control_plane import ControlPlane
from bench.operator.peers import SailVL, until

_SAMPLE_SECONDS = 0.5


class Replica:
    """Async context manager that starts a replica and, at the end, stops it.

    `number`: 0 for the leader, which is awaited; a standby, with a larger number, is not.
    """

    def __init__(self, plane: ControlPlane, number: int) -> None:
        self.operator = SailVL(plane, number)
        self._is_leader = number == 0
        self._watching: asyncio.Task[None] | None = None
        self.peak_mib = 0.0
        """Peak resident memory so far, in MiB, which is still known after the process has ended."""
        self.has_failed = False
        """Whether the process ended by itself."""

    async def __aenter__(self) -> Replica:
        self.operator.spawn()
        self._watching = asyncio.create_task(self._watch())
        try:
            if self._is_leader:
                await until(self.operator.is_ready, 60)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self.operator.stop()

    async def _watch(self) -> None:
        """Sample the memory until the process ends. The kernel keeps the peak, so that only the last sample counts."""
        while self.operator.process.poll() is None:
            self.peak_mib = max(self.peak_mib, self.operator.memory_mib())
            await asyncio.sleep(_SAMPLE_SECONDS)
        self.has_failed = True
