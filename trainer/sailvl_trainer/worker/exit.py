"""The end of a worker: its handler of SIGTERM, and the only code that ends its process.

At SIGTERM the worker creates the stop file, at which ranks save a checkpoint and exit. The signal isn't forwarded,
because ranks that it killed would look like lost peers to the others. Every exit, for whatever cause, writes the
termination message and kills the remaining ranks. Called by `worker/main.py`, which sets the handler before torch is
imported, so that this module must not import it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import ExitCode, Progress, Termination
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.rank.termination import write_termination
from sailvl_trainer.storage.codec import read_progress
from sailvl_trainer.worker.ranks import RankProcesses

STALL_REPORT_SECONDS = 60
"""If the watchdog has found a stall, an exit with PEER_LOST waits up to this long, so that the stall is reported."""


class WorkerExit:
    """Ends the worker's process; it may be called from any thread, and the first call counts."""

    def __init__(self, termination_log: Path, ranks: RankProcesses) -> None:
        self._path, self._ranks, self._once = termination_log, ranks, threading.Lock()
        self.progress_file: Path | None = None
        """Progress document of the first rank; None until the scratch directory is known."""
        self.has_stalled = threading.Event()
        """Set once the watchdog has found a stall: peers that are lost from then on have stalled too."""

    def __call__(self, termination: Termination) -> NoReturn:
        """Write the termination message, kill the ranks and exit.

        After a stall, an exit with PEER_LOST gives way to the watchdog's, which reports the stall.
        """
        if termination.exit_code == ExitCode.PEER_LOST and self.has_stalled.is_set():
            time.sleep(STALL_REPORT_SECONDS)  # the watchdog ends the process meanwhile
        if not self._once.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        if termination.exit_code:
            print(termination.message, file=sys.stderr, flush=True)  # noqa: T201
        try:
            write_termination(self._path, self._add_checkpoint(termination))
        except OSError as error:
            print(f"can't write the termination message: {error}", file=sys.stderr, flush=True)  # noqa: T201
        self._ranks.send_signal(signal.SIGKILL)
        os._exit(termination.exit_code)

    def _add_checkpoint(self, termination: Termination) -> Termination:
        """Add the newest checkpoint that this worker knows of, in case the operator can't read its /progress."""
        if termination.checkpoint is not None or self.progress_file is None:
            return termination
        with suppress(OSError, ValueError):
            progress = read_progress(self.progress_file)
            return termination if progress is None else replace(termination, checkpoint=progress.checkpoint)
        return termination


def handle_sigterm(
    ranks: RankProcesses, scratch: Scratch, grace_seconds: int, exit_worker: Callable[[Termination], None]
) -> None:
    """Handle SIGTERM in a thread; a second signal changes nothing.

    The main thread may wait in C++ code of torch, during which Python runs no signal handlers.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        scratch.stop_file.touch()
        progress = read_progress(scratch.progress_file)
        if is_starting(progress, ranks.started_at):
            saved = None if progress is None else progress.checkpoint
            message = "stopped while starting; no work is lost"
            exit_worker(Termination(exit_code=ExitCode.PREEMPTED, message=message, checkpoint=saved))
        time.sleep(grace_seconds)
        exit_worker(describe_grace_timeout(read_progress(scratch.progress_file), grace_seconds))

    threading.Thread(target=watch, name="sigterm", daemon=True).start()


def is_starting(progress: Progress | None, started_at: float | None) -> bool:
    """Whether there are no ranks, or those started at `started_at` (Unix seconds) have done no work yet."""
    return progress is None or started_at is None or progress.time < started_at or progress.phase == "starting"


def describe_grace_timeout(progress: Progress | None, grace_seconds: int) -> Termination:
    """Return the termination of a worker whose ranks didn't exit within the grace period.

    Optimizer steps since the last checkpoint are lost. Samples and questions are saved as they are done, so that only
    those in progress are.
    """
    timeout = f"the ranks did not exit within {grace_seconds} s of SIGTERM"
    if progress is None or progress.unit != "steps":
        return Termination(exit_code=ExitCode.PREEMPTED, message=f"{timeout}; completed work is saved")
    saved = progress.checkpoint
    lost_steps = progress.step - (0 if saved is None else saved.step)
    if lost_steps <= 0:
        return Termination(exit_code=ExitCode.PREEMPTED, message=f"{timeout}; no step is lost", checkpoint=saved)
    message = (
        f"no checkpoint was saved within {grace_seconds} s of SIGTERM; {lost_steps} steps since the last one are lost; "
        "raise the grace period"
    )
    return Termination(exit_code=ExitCode.TERMINATED, message=message, checkpoint=saved)
