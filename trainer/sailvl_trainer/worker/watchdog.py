"""The watchdog ends a worker with STALLED if its ranks make no progress or are never started.

A rank in a collective waits for one that hangs elsewhere, so all workers of an attempt stall at the same time. Each
writes the stacks of its own ranks to its log before the first worker exits.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from sailvl_trainer.contract import RENDEZVOUS_PORT, WATCHDOG_INTERVAL_SECONDS, ExitCode, Phase, Progress, Termination
from sailvl_trainer.rank.bootstrap import STACK_SIGNAL
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.storage.codec import read_progress
from sailvl_trainer.worker.exit import WorkerExit
from sailvl_trainer.worker.ranks import RankProcesses

SLOW_PHASES: frozenset[Phase] = frozenset({"starting", "checkpointing", "evaluating", "finished"})
"""Phases that may pass minutes without a heartbeat, to load a model or to write a checkpoint or a report."""
SLOW_PHASE_MULTIPLIER = 10
"""Factor of the stall timeout in slow phases."""
STACK_WAIT_SECONDS = 2.0
"""Seconds in which ranks write their stacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogTimeouts:
    """How long a worker may make no progress, in seconds."""

    stall_seconds: int
    """Longest time without a heartbeat of a rank; 0 turns the watchdog off, whatever the worker waits for."""
    start_seconds: int = 0
    """Longest time until the first ranks are started, in which the workers find each other and the storage answers;
    0: without limit."""


def start_watchdog(
    ranks: RankProcesses, scratch: Scratch, *, timeouts: WatchdogTimeouts, nodes: int, exit_worker: WorkerExit
) -> None:
    """Watch the ranks in a thread, from now on."""
    if not timeouts.stall_seconds:
        return
    interval, began = min(WATCHDOG_INTERVAL_SECONDS, timeouts.stall_seconds / 4), time.monotonic()

    def watch() -> None:
        while True:
            time.sleep(interval)
            stall = find_stalled_rank(ranks, scratch, now=time.time(), stall_seconds=timeouts.stall_seconds)
            stall = stall or find_start_timeout(ranks, waited=time.monotonic() - began, limit=timeouts.start_seconds)
            if stall is not None:
                break
        exit_worker.has_stalled.set()
        own_stack = format_main_thread_stack()
        stacks = collect_stacks(ranks, scratch.stacks_dir) or [f"worker:\n{own_stack}"]
        print("\n".join(stacks), file=sys.stderr, flush=True)  # noqa: T201
        if nodes > 1:  # the ranks of other workers lose a peer when this one exits: let their watchdogs be first
            time.sleep(interval + STACK_WAIT_SECONDS + 1)
        exit_worker(replace(describe_stall(stall, stacks), ranks_started=ranks.have_started.is_set()))

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def find_stalled_rank(ranks: RankProcesses, scratch: Scratch, *, now: float, stall_seconds: int) -> str | None:
    """Return a message about the first rank without a heartbeat; None if all ranks progress or none are running."""
    started_at = ranks.started_at
    for local_rank in range(len(ranks.pids)) if started_at is not None else ():
        progress = read_progress(scratch.progress_path(local_rank))
        exceeded = find_exceeded_timeout(progress, started_at=started_at or now, now=now, stall_seconds=stall_seconds)
        if exceeded:
            phase = f"{progress.phase}, after step {progress.step}" if progress is not None else "starting"
            return f"no progress for {exceeded} s ({phase})"
    return None


def find_start_timeout(ranks: RankProcesses, *, waited: float, limit: int) -> str | None:
    """Return a message if no rank was started within `limit` seconds; None if one was, or the worker may still wait."""
    if not limit or waited <= limit or ranks.have_started.is_set():
        return None
    return (
        f"no rank was started within {limit} s: the storage does not respond or the workers can't reach each other; "
        f"check the volume, NetworkPolicies (port {RENDEZVOUS_PORT}) and the cluster's DNS"
    )


def find_exceeded_timeout(progress: Progress | None, *, started_at: float, now: float, stall_seconds: int) -> int:
    """Return the timeout in seconds that a rank has exceeded, or 0 if it is within its timeout.

    `started_at` is when the running ranks were started; an older progress document is from the ranks before a restart.
    """
    is_slow = progress is None or progress.time < started_at or progress.phase in SLOW_PHASES
    timeout = stall_seconds * (SLOW_PHASE_MULTIPLIER if is_slow else 1)
    last_heartbeat = started_at if progress is None else max(progress.time, started_at)
    return timeout if now - last_heartbeat > timeout else 0


def format_main_thread_stack() -> str:
    """Return the stack of this process's main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame))


def collect_stacks(ranks: RankProcesses, stacks_dir: Path) -> list[str]:
    """Return the current stacks of each rank, by local rank."""
    offsets = {pid: _file_size(stacks_dir / f"{pid}.txt") for pid in ranks.pids}
    ranks.send_signal(STACK_SIGNAL)
    time.sleep(STACK_WAIT_SECONDS)
    return [f"local rank {i}:\n{_read_stacks(pid, stacks_dir, at)}" for i, (pid, at) in enumerate(offsets.items())]


def describe_stall(stall: str, stacks: list[str]) -> Termination:
    """Return the termination of a stalled worker.

    Stacks are sorted so that the one that the fewest ranks have in common comes last, because a termination message
    that is too long loses the start of its traceback.
    """
    bodies = [stack.partition("\n")[2] for stack in stacks]
    frames = [_extract_frames(body) for body in bodies]
    counts = Counter(frames)
    ordered = sorted(range(len(stacks)), key=lambda i: -counts[frames[i]])
    return Termination(
        exit_code=ExitCode.STALLED,
        message=f"{stall}; stacks are in the log of every worker",
        traceback="\n".join(stacks[i] for i in ordered),
    )


def _read_stacks(pid: int, stacks_dir: Path, offset: int) -> str:
    """Return what a rank has written after `offset` or, if it wrote nothing, its state: a stopped process can't."""
    path = stacks_dir / f"{pid}.txt"
    text = path.read_bytes()[offset:].decode(errors="replace") if path.exists() else ""
    return text or f"no stacks; {_read_process_state(Path(f'/proc/{pid}'))}"


def _read_process_state(folder: Path) -> str:
    """Return the kernel's state of a process, such as `state T (stopped), in do_signal_stop`."""
    try:
        status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        kernel_function = (folder / "wchan").read_text().strip("0\n")
    except OSError:
        return "the process has ended"
    return f"state {status['State']}" + (f", in {kernel_function}" if kernel_function else "")


def _extract_frames(stacks: str) -> str:
    """Return the lines of frames alone, without thread IDs, which differ between processes."""
    return "\n".join(line for line in stacks.splitlines() if line.startswith("  File"))


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
