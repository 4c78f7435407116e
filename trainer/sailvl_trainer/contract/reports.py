"""Reports of a worker: progress while it runs and, when it exits, a termination message with the stage's result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sailvl_trainer.contract.stage_config import SCHEMA_VERSION, Kind

Phase = Literal["starting", "running", "checkpointing", "evaluating", "stopping", "finished"]
"""Phase of a rank; the watchdog allows more time in some phases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint on the shared storage."""

    step: int
    """Optimizer step after which it was saved."""
    path: str
    """Path of its directory, relative to the root of the storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A worker's progress, served on /progress; every field is set only on the worker of global rank 0."""

    attempt: int
    """Number of the attempt."""
    phase: Phase
    """Phase of the rank."""
    step: int = 0
    """Number of optimizer steps, samples or questions done, including those before a resume."""
    steps: int = 0
    """Total number of steps, samples or questions; 0 if it is not known yet."""
    unit: Literal["steps", "samples", "questions"] = "steps"
    """Unit of step and steps."""
    tokens: int = 0
    """Number of tokens trained on, without padding, including those before a resume."""
    samples: int = 0
    """Number of samples trained on, including those before a resume."""
    lost_steps: int = 0
    """Optimizer steps repeated so far, over all attempts, because training resumed from an earlier checkpoint."""
    in_place_restarts: int = 0
    """Number of times that this attempt's ranks were restarted in place."""
    eta_seconds: float | None = None
    """Estimated seconds until the stage ends; None if there is no estimate."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Latest values by name, such as loss, learning_rate and tokens_per_second; all are finite."""
    checkpoint: Checkpoint | None = None
    """Newest checkpoint; None if none was saved."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of this attempt by activity: starting, training, dataWait, checkpoint, evaluating."""
    time: float = 0.0
    """Unix seconds at which the document was updated; it serves as the heartbeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a stage that succeeded, in RESULT_FILE and in the termination message."""

    schema_version: int = SCHEMA_VERSION
    """Version of this document."""
    stage: str
    """Name of the stage that computed it."""
    kind: Kind
    """Kind of the stage."""
    digest: str
    """Digest of the settings that led to it."""
    attempt: int
    """Attempt that computed it."""
    output: str
    """Path of the stage's output, relative to the root of the storage."""
    steps: int = 0
    """Number of optimizer steps."""
    tokens: int = 0
    """Number of tokens trained on, without padding."""
    samples: int = 0
    """Number of samples kept by curation, trained on, or scored."""
    lost_steps: int = 0
    """Optimizer steps repeated, over all attempts, because training resumed from an earlier checkpoint."""
    seconds: float = 0.0
    """Wall-clock seconds of the attempt that finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Values for gates and the status: heldOutLoss, heldOutLossBefore, heldOutLossShuffled, skippedSamples, score,
    kept, dropped and others; all are finite."""
    reused: bool = False
    """Whether the result was found on the storage instead of being computed by this attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Termination:
    """A worker's termination message: at most TERMINATION_MESSAGE_BYTES of JSON in its container's termination log."""

    exit_code: int
    """Exit code of the container."""
    rank: int | None = None
    """Global rank that failed first; None if no rank failed."""
    message: str = ""
    """One line that says what happened and what to change."""
    traceback: str = ""
    """End of the failed rank's traceback, or stacks of ranks that stalled."""
    checkpoint: Checkpoint | None = None
    """Newest checkpoint that this worker knows of."""
    result: Result | None = None
    """Result of the stage, from the worker of index 0 if the stage succeeded."""
    superseded_by: int = 0
    """Later attempt that has claimed the stage, which is why this one stopped; 0 if none has."""
    ranks_started: bool = True
    """Whether this worker has ever started a rank."""
