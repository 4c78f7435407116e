"""Ends a worker whose ranks make no progress: their stacks go to the log, then it ends with STALLED."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sailvl_trainer.contract import Progress
from sailvl_trainer.runtime.documents import decode
from sailvl_trainer.runtime.telemetry import PROGRESS_FILE

PHASES = frozenset({"running"})
"""Starting, saving and evaluating take as long as they take."""
STACK_SECONDS = 2.0
"""For the ranks to print their stacks."""


def start_watchdog(
    scratch: Path, stall_seconds: int, pids: Callable[[], list[int]], on_stall: Callable[[str], None]
) -> None:
    """Watch in a thread; 0 seconds: never. `pids`: the ranks as they are now."""
    if not stall_seconds:
        return

    def watch() -> None:
        while not _is_stalled(scratch / PROGRESS_FILE, stall_seconds):
            time.sleep(min(5.0, stall_seconds / 4))
        for pid in pids():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        on_stall(f"no progress for {stall_seconds} s; the stack of every rank is in the log")

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def _is_stalled(path: Path, stall_seconds: int) -> bool:
    try:
        progress = decode(Progress, path.read_bytes())
    except (OSError, ValueError):
        return False
    return progress.phase in PHASES and time.time() - progress.time > stall_seconds
