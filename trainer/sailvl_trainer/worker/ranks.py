"""The processes of this worker's ranks: the agent records them; the watchdog and the worker's exit signal them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable


class RankProcesses:
    """Process IDs of the running ranks, thread-safe. Empty before the first start and during a restart in place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: tuple[int, ...] = ()
        self._started_at = 0.0
        self.have_started = threading.Event()
        """Set once the ranks have been started for the first time."""

    def set_running(self, pids: Iterable[int]) -> None:
        """Record that the ranks were started just now, with these process IDs by local rank."""
        with self._lock:
            self._pids, self._started_at = tuple(pids), time.time()
        self.have_started.set()

    def set_stopped(self) -> tuple[int, ...]:
        """Record that the ranks have ended, and return the process IDs that they had."""
        with self._lock:
            pids, self._pids = self._pids, ()
        return pids

    @property
    def started_at(self) -> float | None:
        """Unix seconds at which the running ranks were started; None if none are running."""
        with self._lock:
            return self._started_at if self._pids else None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process IDs by local rank."""
        with self._lock:
            return self._pids

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to every running rank; SIGKILL goes to the rank's whole process group."""
        with self._lock:
            for pid in self._pids:
                _send_signal(pid, number)


def _send_signal(pid: int, number: signal.Signals) -> None:
    try:
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return
