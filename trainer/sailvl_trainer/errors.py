"""The trainer's exceptions. Each ends its rank with the exit code below, from which the operator derives the cause.

TrainerError
├── ConfigError      64  the settings can't work
├── DataError        65  a shard or a sample is damaged or invalid
├── NonFiniteError   66  the loss or the gradient norm is NaN or infinite
├── OutOfMemory      67  the accelerator or the container ran out of memory
├── StorageError     74  a volume is full or unavailable, or a file can't be read at the moment
├── Preempted        75  stopped on request, with a checkpoint or nothing to lose; or superseded by a later attempt
└── PeerLost         76  the connection to another rank was lost
"""

from __future__ import annotations

from sailvl_trainer.contract import Checkpoint, ExitCode


class TrainerError(Exception):
    """Base class. The message says what happened and what to change."""

    exit_code: int


class ConfigError(TrainerError):
    """The settings can't work; another attempt with the same settings fails too."""

    exit_code = ExitCode.CONFIG


class DataError(TrainerError):
    """A shard or a sample is damaged or invalid; the message names it."""

    exit_code = ExitCode.DATA


class NonFiniteError(TrainerError):
    """The loss or the gradient norm is NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class OutOfMemory(TrainerError):  # noqa: N818  # named as its exit code
    """The accelerator or the container ran out of memory."""

    exit_code = ExitCode.OUT_OF_MEMORY


class StorageError(TrainerError):
    """A volume is full or unavailable, or a file that may be intact can't be read at the moment."""

    exit_code = ExitCode.STORAGE


class Preempted(TrainerError):  # noqa: N818  # a stop on request is no error
    """The rank stopped because the worker received SIGTERM or a later attempt superseded this one."""

    exit_code = ExitCode.PREEMPTED

    def __init__(self, message: str, *, checkpoint: Checkpoint | None = None, superseded_by: int = 0) -> None:
        """`checkpoint` is the newest one that was saved; `superseded_by` is the later attempt, 0 if there is none."""
        super().__init__(message)
        self.checkpoint = checkpoint
        self.superseded_by = superseded_by


class PeerLost(TrainerError):  # noqa: N818  # named as its exit code
    """A collective failed because the connection to another rank was lost."""

    exit_code = ExitCode.PEER_LOST
