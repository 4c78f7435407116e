"""SIGTERM: a stop file for the ranks, who save and end by themselves; the end of the grace for those who don't.

The signal is not handed on: ranks would take it as a neighbour's death.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from sailvl_trainer.contract import ExitCode, Termination
from sailvl_trainer.runtime.ranks import Ranks
from sailvl_trainer.runtime.scratch import Scratch


def handle_sigterm(ranks: Ranks, scratch: Scratch, grace_seconds: int, end: Callable[[Termination], None]) -> None:
    """Answer in a thread, since the main one may sit in a C++ wait, where Python's handlers don't run."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        if not ranks.has_begun.is_set():
            end(Termination(exit_code=ExitCode.PREEMPTED, message="stopped before its ranks began"))
        scratch.stop_file.touch()
        time.sleep(grace_seconds)
        words = f"no checkpoint within {grace_seconds} s of SIGTERM; the steps since the last one are lost"
        end(Termination(exit_code=ExitCode.TERMINATED, message=words))

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
