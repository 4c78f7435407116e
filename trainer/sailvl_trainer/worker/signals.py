"""Handle SIGTERM: create the stop file, at which ranks save a checkpoint and exit, and end the worker after the grace.

The signal isn't forwarded, because ranks that it killed would look like lost peers to the others.
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
from sailvl_trainer.worker.ranks import RankProcesses


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
