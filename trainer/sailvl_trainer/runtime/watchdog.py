"""Ends a worker whose ranks make no progress: their stacks go to the log, then it ends with STALLED."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from sailvl_trainer.contract import Phase, Progress
from sailvl_trainer.runtime.child import STACK_SIGNAL
from sailvl_trainer.runtime.documents import decode
from sailvl_trainer.runtime.ranks import Ranks
from sailvl_trainer.runtime.scratch import Scratch

PATIENT: frozenset[Phase] = frozenset({"starting", "checkpointing", "evaluating", "finished"})
"""Phases that take as long as they take."""
STACK_SECONDS = 2.0
"""For the ranks to print their stacks."""


def start_watchdog(ranks: Ranks, scratch: Scratch, stall_seconds: int, on_stall: Callable[[str, str], None]) -> None:
    """Watch in a thread; 0 seconds: never. `on_stall` gets a message and the stacks of all ranks."""
    if not stall_seconds:
        return

    def watch() -> None:
        while True:
            progress = _read(scratch.progress_file)
            if is_stalled(progress, since=ranks.since, now=time.time(), stall_seconds=stall_seconds):
                break
            time.sleep(min(5.0, stall_seconds / 4))
        step = progress.step if progress is not None else 0
        words = f"no progress for {stall_seconds} s after step {step}; the stack of every rank is in the log"
        on_stall(words, collect_stacks(ranks, scratch.stacks))

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def collect_stacks(ranks: Ranks, folder: Path) -> str:
    """Where each rank is at present, one after the other."""
    ranks.signal(STACK_SIGNAL)
    time.sleep(STACK_SECONDS)
    paths = [folder / f"{pid}.txt" for pid in ranks.pids]
    stacks = [path.read_text() if path.exists() else "" for path in paths]
    return "\n".join(f"local rank {i}:\n{stack or 'no answer'}" for i, stack in enumerate(stacks))


def is_stalled(progress: Progress | None, *, since: float | None, now: float, stall_seconds: float) -> bool:
    """`since`: start of the present ranks, None without any. A document older than that tells of their predecessors."""
    if progress is None or since is None or progress.time < since or progress.phase in PATIENT:
        return False
    return now - progress.time > stall_seconds


def _read(path: Path) -> Progress | None:
    try:
        return decode(Progress, path.read_bytes())
    except FileNotFoundError:
        return None
