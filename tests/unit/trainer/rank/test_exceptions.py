"""Exceptions of a rank become exit codes and messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sailvl_trainer.contract import Checkpoint
from sailvl_trainer.errors import ConfigError, Preempted, StorageError
from sailvl_trainer.rank.exceptions import build_termination


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GLOO = "[gloo/transport/tcp/pair.cc:543] Connection closed by peer [10.0.0.3]:4242"
ERRORS = [
    pytest.param(ConfigError("set less"), 64, "set less", id="error of the trainer"),
    pytest.param(ValueError("odd"), 1, "ValueError: odd", id="any other error"),
    pytest.param(RuntimeError(GLOO), 76, "lost the connection to another rank", id="gloo: peer closed the connection"),
    pytest.param(
        raised_from(KeyError("x"), RuntimeError(GLOO)),
        76,
        "lost the connection to another rank",
        id="gloo, as the cause",
    ),
    pytest.param(
        dist.DistBackendError("ncclRemoteError"), 76, "lost the connection to another rank", id="nccl: remote error"
    ),
    pytest.param(dist.DistBackendError("ncclInvalidUsage: Duplicate GPU"), 1, "Duplicate GPU", id="nccl: own error"),
    pytest.param(ConnectionResetError("Connection reset by peer"), 1, "ConnectionResetError", id="another server"),
    pytest.param(torch.OutOfMemoryError("tried 2 GiB"), 67, "lower packTokens", id="GPU memory"),
    pytest.param(MemoryError(), 67, "raise the workers' memory limit", id="host memory"),
    pytest.param(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        67,
        "raise the workers' memory limit",
        id="host memory, in torch",
    ),
    pytest.param(StorageError("make room"), 74, "make room", id="storage"),
]


@pytest.mark.parametrize(("error", "code", "message"), ERRORS)
def test_exception_becomes_exit_code_and_message(error: Exception, code: int, message: str) -> None:
    termination = build_termination(error, rank=3)
    assert (termination.exit_code, termination.rank) == (code, 3)
    assert message in termination.message
    assert type(error).__name__ in termination.traceback


def test_preemption_carries_its_checkpoint() -> None:
    saved = Checkpoint(step=4, path="demo/c")
    termination = build_termination(Preempted("stopped", checkpoint=saved), rank=0)
    assert (termination.exit_code, termination.checkpoint) == (75, saved)
