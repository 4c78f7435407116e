"""SIGTERM: a stop file for the ranks, who save and end by themselves; the end of the grace for those who don't.

The signal is not handed on: ranks would take it as a neighbour's death.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from sailvl_trainer.contract import ExitCode, Progress, Termination
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.storage.codec import read_progress
from sailvl_trainer.worker.ranks import Ranks


def handle_sigterm(ranks: Ranks, scratch: Scratch, grace_seconds: int, end: Callable[[Termination], None]) -> None:
    """Answer in a thread, since the main one may sit in a C++ wait, where Python's handlers don't run.

    A second signal changes nothing.
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
        if is_starting(progress, ranks.since):
            saved = None if progress is None else progress.checkpoint
            words = "stopped while it started; nothing is lost"
            end(Termination(exit_code=ExitCode.PREEMPTED, message=words, checkpoint=saved))
        time.sleep(grace_seconds)
        end(describe_grace_timeout(read_progress(scratch.progress_file), grace_seconds))

    threading.Thread(target=watch, name="sigterm", daemon=True).start()


def is_starting(progress: Progress | None, since: float | None) -> bool:
    """Whether the present ranks have done nothing yet, or there are none; `since`: their start."""
    return progress is None or since is None or progress.time < since or progress.phase == "starting"


def describe_grace_timeout(progress: Progress | None, grace_seconds: int) -> Termination:
    """Steps since the checkpoint are lost; of other work, which is kept piece by piece, what was in hand."""
    waited = f"not done within {grace_seconds} s of SIGTERM"
    if progress is None or progress.unit != "steps":
        return Termination(exit_code=ExitCode.PREEMPTED, message=f"{waited}; what is done stays done")
    saved = progress.checkpoint
    lost = progress.step - (0 if saved is None else saved.step)
    if lost <= 0:
        return Termination(exit_code=ExitCode.PREEMPTED, message=f"{waited}; no step is lost", checkpoint=saved)
    words = f"no checkpoint within {grace_seconds} s of SIGTERM; the {lost} steps since the last one are lost"
    return Termination(exit_code=ExitCode.TERMINATED, message=words, checkpoint=saved)
