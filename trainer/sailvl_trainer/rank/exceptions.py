"""What an exception of a rank means for the worker: its exit code, and words for people."""

from __future__ import annotations

import traceback

import torch
import torch.distributed as dist

from sailvl_trainer.contract import Termination
from sailvl_trainer.errors import OutOfMemory, PeerLost, Preempted, TrainerError
from sailvl_trainer.rank.cgroup import read_memory
from sailvl_trainer.storage.errors import format_bytes

PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "application timeout caused pair closure",
    "timed out waiting",
    "ncclremoteerror",
)
"""What gloo and nccl say of a neighbour that is gone; gloo says it in a plain RuntimeError."""
OWN_WORDS = ("ncclinvalidusage", "ncclinvalidargument", "duplicate gpu")
"""What nccl says of a mistake on this side."""

CPU_WORDS = "can't allocate memory"
"""What torch says in a plain RuntimeError when the machine gives it none."""


def build_termination(error: BaseException, rank: int) -> Termination:
    """The last words of a rank that failed, or stopped on request."""
    meant = _interpret(error)
    return Termination(
        exit_code=meant.exit_code if isinstance(meant, TrainerError) else 1,
        rank=rank,
        message=str(meant) if isinstance(meant, TrainerError) else f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        checkpoint=error.checkpoint if isinstance(error, Preempted) else None,
        superseded_by=error.superseded_by if isinstance(error, Preempted) else 0,
    )


def _interpret(error: BaseException) -> BaseException:
    """torch's own errors as ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(f"{_describe_memory()}; lower packTokens or packTiles, or raise the ZeRO stage: {error}")
    if isinstance(error, MemoryError) or (type(error) is RuntimeError and CPU_WORDS in str(error)):
        return OutOfMemory(f"out of memory: {read_memory().describe()}; raise the workers' memory limit: {error}")
    if is_peer_lost(error):
        return PeerLost(f"a collective failed since another rank is gone: {error}")
    return error


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is that of a collective whose neighbour is gone."""
    if error is None:
        return False
    words = str(error).lower()
    if isinstance(error, dist.DistError):
        return not any(w in words for w in OWN_WORDS)
    if type(error) is RuntimeError and any(w in words for w in PEER_WORDS):
        return True
    return is_peer_lost(error.__cause__)


def _describe_memory() -> str:
    if not torch.cuda.is_available():
        return "the accelerator's memory is full"
    _, total = torch.cuda.mem_get_info()
    return f"out of GPU memory: peak {format_bytes(torch.cuda.max_memory_allocated())} of {format_bytes(total)}"
