"""Find the rank whose failure made the others fail: a dead rank breaks the connections of all others within moments."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import NON_RETRYABLE_EXIT_CODES, ExitCode, Termination
from sailvl_trainer.rank.cgroup import MemoryUsage
from sailvl_trainer.storage.codec import decode

HINTS = {
    signal.SIGBUS: "a memory-mapped file is on a full or missing volume; check the storage, /dev/shm and the scratch "
    "directory",
    signal.SIGSEGV: "its stack is in the log",
    signal.SIGABRT: "its stack is in the log",
}
"""Advice by signal, for the message."""


def find_root_cause(
    failures: Mapping[int, ProcessFailure], *, stacks_dir: Path | None = None, oom: MemoryUsage | None = None
) -> Termination:
    """Return the termination of the rank that failed first: its own report or, if it left none, one from its exit code.

    `failures` holds at least one failure by global rank. `stacks_dir` has the stacks of ranks that died by a signal.
    `oom` is given if the kernel has killed a process of the container because memory ran out.
    """
    rank, failure = min(failures.items(), key=lambda item: (_precedence(item[1].exitcode), item[1].timestamp, item[0]))
    try:
        return decode(Termination, failure.message)
    except ValueError:  # the message is torch's own, because the rank left no report
        code = failure.exitcode
    if code == -signal.SIGKILL and oom is not None:
        message = f"rank {rank} was OOM-killed: {oom.describe()}; raise the workers' memory limit"
        return Termination(exit_code=ExitCode.OUT_OF_MEMORY, rank=rank, message=message)
    return Termination(
        exit_code=_to_exit_code(code),
        rank=rank,
        message=_describe_exit(rank, code),
        traceback=read_stack(stacks_dir, failure.pid),
    )


def read_stack(stacks_dir: Path | None, pid: int) -> str:
    """Return the stack that a rank wrote when a signal such as SIGSEGV ended it, or an empty string."""
    path = None if stacks_dir is None else stacks_dir / f"{pid}.txt"
    return path.read_text() if path is not None and path.exists() else ""


def _precedence(code: int) -> int:
    """Return the rank of an exit code among possible causes, 0 first.

    Non-retryable codes come first, then any other code, then a lost peer, then SIGTERM, which the agent itself sends.
    """
    if code in NON_RETRYABLE_EXIT_CODES:
        return 0
    if code == ExitCode.PEER_LOST:
        return 2
    return 3 if code in (-signal.SIGTERM, 128 + signal.SIGTERM) else 1


def _to_exit_code(code: int) -> int:
    """Return 128 + N for signal N, as shells and the kubelet report it."""
    return code if code > 0 else 128 - code


def _describe_exit(rank: int, code: int) -> str:
    if code >= 0:
        return f"rank {rank} exited with code {code} and no error report; see the log"
    if -code not in set(signal.Signals):
        return f"rank {rank} was killed by signal {-code}"
    number = signal.Signals(-code)
    hint = HINTS.get(number)
    return f"rank {rank} was killed by {number.name}" + (f"; {hint}" if hint else "")
