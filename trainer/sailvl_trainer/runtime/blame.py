"""Which rank's end made the others end, and its words: one dead rank takes its neighbours down within moments."""

from __future__ import annotations

import signal
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import FINAL_CODES, ExitCode, Termination
from sailvl_trainer.runtime.documents import decode


def blame(failures: Mapping[int, ProcessFailure]) -> Termination:
    """`failures`: by global rank, at least one. The rank's own words, if it left any."""
    rank, failure = min(failures.items(), key=lambda item: (_group(item[1].exitcode), item[1].timestamp, item[0]))
    try:
        return decode(Termination, failure.message)
    except ValueError:  # torch's own words: the rank left none
        return Termination(exit_code=_code(failure.exitcode), rank=rank, message=_describe(rank, failure.exitcode))


def _group(code: int) -> int:
    """A final code, then any other, then a lost peer, then what the agent itself has ended."""
    if code in FINAL_CODES:
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
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"rank {rank} was ended by {name}{hint}"
