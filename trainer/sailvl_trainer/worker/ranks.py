"""The ranks of this worker as they are now: written by the agent, read by the watchdog and by whoever ends them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable


class Ranks:
    """Thread-safe. Empty before the first start and while the agent starts them again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: tuple[int, ...] = ()
        self._since = 0.0
        self.has_begun = threading.Event()
        """Set once ranks have ever been started."""

    def begin(self, pids: Iterable[int]) -> None:
        """They run from now on."""
        with self._lock:
            self._pids, self._since = tuple(pids), time.time()
        self.has_begun.set()

    def end(self) -> tuple[int, ...]:
        """They are no more; the pids that they had."""
        with self._lock:
            pids, self._pids = self._pids, ()
        return pids

    @property
    def since(self) -> float | None:
        """Unix seconds of their start; None while there are none."""
        with self._lock:
            return self._since if self._pids else None

    @property
    def pids(self) -> tuple[int, ...]:
        """By local rank."""
        with self._lock:
            return self._pids

    def signal(self, number: signal.Signals) -> None:
        """To all that still live. Each leads a process group, with whatever it has started in it."""
        with self._lock:
            for pid in self._pids:
                _signal_one(pid, number)


def _signal_one(pid: int, number: signal.Signals) -> None:
    try:
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return
