"""Translate the exception that ended a rank into its termination: exit code, message and traceback.

torch raises plain RuntimeErrors for several failures, which are recognized by their messages. Called by `rank/main.py`.
"""

from __future__ import annotations

import traceback

import torch
import torch.distributed as dist

from sailvl_trainer.contract import Termination
from sailvl_trainer.errors import OutOfMemory, PeerLost, Preempted, TrainerError
from sailvl_trainer.rank.cgroup import read_memory
from sailvl_trainer.storage.files import format_bytes

LOST_PEER_MESSAGES = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "application timeout caused pair closure",
    "timed out waiting",
    "ncclremoteerror",
)
"""Parts of the messages of gloo and nccl, in lower case, after the connection to another rank was lost."""
OWN_ERROR_MESSAGES = ("ncclinvalidusage", "ncclinvalidargument", "duplicate gpu")
"""Parts of nccl's messages, in lower case, for an error of the rank itself."""
CPU_OUT_OF_MEMORY_MESSAGE = "can't allocate memory"
"""Part of the message of torch's plain RuntimeError for a failed allocation on the CPU."""


def build_termination(error: BaseException, rank: int) -> Termination:
    """Return the termination of a rank that raised an error, or that stopped on request."""
    translated = _translate(error)
    is_known = isinstance(translated, TrainerError)
    return Termination(
        exit_code=translated.exit_code if isinstance(translated, TrainerError) else 1,
        rank=rank,
        message=str(translated) if is_known else f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        checkpoint=error.checkpoint if isinstance(error, Preempted) else None,
        superseded_by=error.superseded_by if isinstance(error, Preempted) else 0,
    )


def _translate(error: BaseException) -> BaseException:
    """Return the trainer's exception for one of torch's, or else the error itself."""
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(f"{_describe_gpu_memory()}; lower packTokens or packTiles, or raise zeroStage: {error}")
    if isinstance(error, MemoryError) or (type(error) is RuntimeError and CPU_OUT_OF_MEMORY_MESSAGE in str(error)):
        return OutOfMemory(f"out of memory: {read_memory().describe()}; raise the workers' memory limit: {error}")
    if is_lost_peer_error(error):
        return PeerLost(f"lost the connection to another rank: {error}")
    return error


def is_lost_peer_error(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is a collective's that lost another rank."""
    if error is None:
        return False
    message = str(error).lower()
    if isinstance(error, dist.DistError):
        return not any(part in message for part in OWN_ERROR_MESSAGES)
    if type(error) is RuntimeError and any(part in message for part in LOST_PEER_MESSAGES):
        return True
    return is_lost_peer_error(error.__cause__)


def _describe_gpu_memory() -> str:
    if not torch.cuda.is_available():
        return "out of accelerator memory"
    _, total = torch.cuda.mem_get_info()
    return f"out of GPU memory: peak {format_bytes(torch.cuda.max_memory_allocated())} of {format_bytes(total)}"
