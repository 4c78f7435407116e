"""The trainer's exceptions; each ends the rank with its own exit code, which the operator turns into an action.

TrainerError
├── ConfigError      64  the settings can't work
├── DataError        65  a shard or a record is unreadable
├── NonFiniteError   66  the loss or a gradient is not a number
├── OutOfMemory      67  the accelerator's or the machine's memory is full
├── StorageError     74  a volume is full, gone or broken
├── Preempted        75  stopped on request, with a checkpoint or nothing to lose; or cut off by a later attempt
└── PeerLost         76  another worker is gone
"""

from __future__ import annotations

from sailvl_trainer.contract import Checkpoint, ExitCode


class TrainerError(Exception):
    """Base: says what happened and what to change."""

    exit_code: int


class ConfigError(TrainerError):
    exit_code = ExitCode.CONFIG


class DataError(TrainerError):
    exit_code = ExitCode.DATA


class NonFiniteError(TrainerError):
    exit_code = ExitCode.NON_FINITE


class OutOfMemory(TrainerError):  # noqa: N818  # named as its exit code
    exit_code = ExitCode.OUT_OF_MEMORY


class StorageError(TrainerError):
    exit_code = ExitCode.STORAGE


class Preempted(TrainerError):  # noqa: N818  # a stop on request is no error
    exit_code = ExitCode.PREEMPTED

    def __init__(self, message: str, *, checkpoint: Checkpoint | None = None, superseded_by: int = 0) -> None:
        """`superseded_by`: the one that has cut this one off."""
        super().__init__(message)
        self.checkpoint = checkpoint
        self.superseded_by = superseded_by


class PeerLost(TrainerError):  # noqa: N818  # named as its exit code
    exit_code = ExitCode.PEER_LOST
