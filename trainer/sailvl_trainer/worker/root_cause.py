"""Which rank's end made the others end, and its words: one dead rank takes its neighbours down within moments."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import NON_RETRYABLE_EXIT_CODES, ExitCode, Termination
from sailvl_trainer.rank.cgroup import MemoryUsage
from sailvl_trainer.storage.codec import decode

HINTS = {
    signal.SIGBUS: "a volume that it had mapped is full or gone: look at the storage, /dev/shm and the scratch folder",
    signal.SIGSEGV: "its stack is in the log",
    signal.SIGABRT: "its stack is in the log",
}


def find_root_cause(
    failures: Mapping[int, ProcessFailure], *, stacks: Path | None = None, oom: MemoryUsage | None = None
) -> Termination:
    """`failures`: by global rank, at least one. The rank's own words, if it left any.

    `stacks`: folder of what ranks show when a signal ends them. `oom`: if the kernel has killed for want of memory.
    """
    rank, failure = min(failures.items(), key=lambda item: (_group(item[1].exitcode), item[1].timestamp, item[0]))
    try:
        return decode(Termination, failure.message)
    except ValueError:  # torch's own words: the rank left none
        code = failure.exitcode
    if code == -signal.SIGKILL and oom is not None:
        words = f"rank {rank} was killed by the kernel for want of memory: {oom.describe()}; raise the workers' memory"
        return Termination(exit_code=ExitCode.OUT_OF_MEMORY, rank=rank, message=words)
    return Termination(
        exit_code=_code(code), rank=rank, message=_describe(rank, code), traceback=read_stack(stacks, failure.pid)
    )


def read_stack(stacks: Path | None, pid: int) -> str:
    """What a rank showed when a signal like SIGSEGV ended it; empty: nothing."""
    path = None if stacks is None else stacks / f"{pid}.txt"
    return path.read_text() if path is not None and path.exists() else ""


def _group(code: int) -> int:
    """A final code, then any other, then a lost peer, then what the agent itself has ended."""
    if code in NON_RETRYABLE_EXIT_CODES:
        return 0
    if code == ExitCode.PEER_LOST:
        return 2
    return 3 if code in (-signal.SIGTERM, 128 + signal.SIGTERM) else 1


def _code(code: int) -> int:
    """As shells and the kubelet write it: 128 + the signal."""
    return code if code > 0 else 128 - code


def _describe(rank: int, code: int) -> str:
    if code >= 0:
        return f"rank {rank} ended with exit code {code} and left no words; see the log"
    if -code not in set(signal.Signals):
        return f"rank {rank} was ended by signal {-code}"
    number = signal.Signals(-code)
    hint = HINTS.get(number)
    return f"rank {rank} was ended by {number.name}" + (f"; {hint}" if hint else "")
