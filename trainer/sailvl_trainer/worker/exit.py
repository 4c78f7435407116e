"""The one way out of a worker: its last words, an end to its ranks, the exit code."""

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
from sailvl_trainer.worker.ranks import Ranks

_STALL_SECONDS = 60
"""For which a lost peer gives way to the stall that was found: what is told then takes no longer."""


class Exit:
    """From whichever thread comes first."""

    def __init__(self, termination_log: Path, ranks: Ranks) -> None:
        self._path, self._ranks, self._once = termination_log, ranks, threading.Lock()
        self.progress_file: Path | None = None
        """Where the first rank says how far it is, once that is known."""
        self.has_stalled = threading.Event()
        """The watchdog has found a stall, and will end the worker: a peer that is lost meanwhile did the same."""

    def __call__(self, termination: Termination) -> NoReturn:
        """Say it, end the ranks that still live, and go. Where a stall was found, that is told, not a lost peer."""
        if termination.exit_code == ExitCode.PEER_LOST and self.has_stalled.is_set():
            time.sleep(_STALL_SECONDS)  # the watchdog ends the process meanwhile
        if not self._once.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        if termination.exit_code:
            print(termination.message, file=sys.stderr, flush=True)  # noqa: T201
        try:
            write_termination(self._path, self._add_checkpoint(termination))
        except OSError as error:
            print(f"no termination message: {error}", file=sys.stderr, flush=True)  # noqa: T201
        self._ranks.signal(signal.SIGKILL)
        os._exit(termination.exit_code)

    def _add_checkpoint(self, termination: Termination) -> Termination:
        """The newest that this worker knows of: the operator may have no way to its /progress."""
        if termination.checkpoint is not None or self.progress_file is None:
            return termination
        with suppress(OSError, ValueError):
            progress = read_progress(self.progress_file)
            return termination if progress is None else replace(termination, checkpoint=progress.checkpoint)
        return termination
