"""Ends a worker whose ranks make no progress, or never come to be: stacks go to the log, then it ends with STALLED.

A rank in a collective waits for one that hangs elsewhere, so all workers of an attempt stall at the same time, and each
shows the stacks of its own ranks before the first of them ends.
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
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.storage.codec import read_progress
from sailvl_trainer.worker.exit import Exit
from sailvl_trainer.worker.ranks import Ranks

PATIENT: frozenset[Phase] = frozenset({"starting", "checkpointing", "evaluating", "finished"})
"""Phases without a beat for minutes: a model is loaded, a checkpoint or a report written."""
PATIENCE = 10
"""So many times stall_timeout_seconds, in these."""
STACK_SECONDS = 2.0
"""For the ranks to print their stacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a worker may make no progress."""

    stall_timeout_seconds: int
    """While ranks work; 0: for ever, whatever it waits for."""
    meet_seconds: int = 0
    """Until the first ranks are started: the workers meet then, and the storage has answered; 0: for ever."""


def start_watchdog(ranks: Ranks, scratch: Scratch, *, limits: Limits, nodes: int, end: Exit) -> None:
    """Watch in a thread, from now on."""
    if not limits.stall_timeout_seconds:
        return
    pause, began = min(WATCHDOG_INTERVAL_SECONDS, limits.stall_timeout_seconds / 4), time.monotonic()

    def watch() -> None:
        while True:
            time.sleep(pause)
            silent = find_stalled_rank(
                ranks, scratch, now=time.time(), stall_timeout_seconds=limits.stall_timeout_seconds
            )
            silent = silent or find_start_timeout(ranks, waited=time.monotonic() - began, limit=limits.meet_seconds)
            if silent is not None:
                break
        end.has_stalled.set()
        own = format_main_thread_stack()
        stacks = collect_stacks(ranks, scratch.stacks_dir) or [f"worker:\n{own}"]
        print("\n".join(stacks), file=sys.stderr, flush=True)  # noqa: T201
        if nodes > 1:  # else the others' ranks, which lose a peer, end before their workers have looked
            time.sleep(pause + STACK_SECONDS + 1)
        end(replace(describe_stall(silent, stacks), ranks_started=ranks.has_begun.is_set()))

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def find_stalled_rank(ranks: Ranks, scratch: Scratch, *, now: float, stall_timeout_seconds: int) -> str | None:
    """Which rank is silent for too long, in words; None: all are well, or there are none."""
    since = ranks.since
    for local_rank in range(len(ranks.pids)) if since is not None else ():
        progress = read_progress(scratch.progress_path(local_rank))
        limit = find_exceeded_timeout(
            progress, since=since or now, now=now, stall_timeout_seconds=stall_timeout_seconds
        )
        if limit:
            phase = f"{progress.phase}, after step {progress.step}" if progress is not None else "starting"
            return f"no progress for {limit} s ({phase})"
    return None


def find_start_timeout(ranks: Ranks, *, waited: float, limit: int) -> str | None:
    """What a worker waits for that has never started a rank; None: it has, or may wait longer."""
    if not limit or waited <= limit or ranks.has_begun.is_set():
        return None
    return (
        f"no rank was started within {limit} s: the storage doesn't answer, or the workers don't reach each other; "
        f"look at the volume, at NetworkPolicies (port {RENDEZVOUS_PORT}) and at the cluster's DNS"
    )


def format_main_thread_stack() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame))


def find_exceeded_timeout(progress: Progress | None, *, since: float, now: float, stall_timeout_seconds: int) -> int:
    """The seconds that were allowed, if more have passed; 0: all is well.

    `since`: start of the present ranks. A document older than that tells of their predecessors.
    """
    is_patient = progress is None or progress.time < since or progress.phase in PATIENT
    limit = stall_timeout_seconds * (PATIENCE if is_patient else 1)
    last = since if progress is None else max(progress.time, since)
    return limit if now - last > limit else 0


def collect_stacks(ranks: Ranks, folder: Path) -> list[str]:
    """Where each rank is at present, by local rank."""
    before = {pid: _size(folder / f"{pid}.txt") for pid in ranks.pids}
    ranks.signal(STACK_SIGNAL)
    time.sleep(STACK_SECONDS)
    return [f"local rank {i}:\n{_show(pid, folder, at)}" for i, (pid, at) in enumerate(before.items())]


def describe_stall(silent: str, stacks: list[str]) -> Termination:
    """The message, with the stacks: the one that the fewest ranks share comes last, where the message isn't cut."""
    bodies = [stack.partition("\n")[2] for stack in stacks]
    frames = [_name_frames(body) for body in bodies]
    shared = Counter(frames)
    ordered = sorted(range(len(stacks)), key=lambda i: -shared[frames[i]])
    return Termination(
        exit_code=ExitCode.STALLED,
        message=f"{silent}; stacks are in the log of every worker",
        traceback="\n".join(stacks[i] for i in ordered),
    )


def _show(pid: int, folder: Path, at: int) -> str:
    """A rank's answer, or in its place what the kernel knows: a stopped process can't answer."""
    path = folder / f"{pid}.txt"
    answer = path.read_bytes()[at:].decode(errors="replace") if path.exists() else ""
    return answer or f"no answer; {_read_state(Path(f'/proc/{pid}'))}"


def _read_state(folder: Path) -> str:
    """Return a process's state as text, for example `state T (stopped), in do_signal_stop`."""
    try:
        status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        place = (folder / "wchan").read_text().strip("0\n")
    except OSError:
        return "it is gone"
    return f"state {status['State']}" + (f", in {place}" if place else "")


def _name_frames(stack: str) -> str:
    """The stack without its threads' numbers, which differ between processes."""
    return "\n".join(line for line in stack.splitlines() if line.startswith("  File"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
