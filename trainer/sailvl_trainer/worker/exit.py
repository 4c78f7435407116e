"""The worker's only exit: write the termination message, kill the remaining ranks, exit with the code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import ExitCode, Termination
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
