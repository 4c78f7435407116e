"""A worker, as both sides see it: its environment variables, ports, exit codes and reports.

A worker serves its progress while it runs. When it exits, it leaves a termination message, with the stage's result.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from sailvl_trainer.contract.stage_config import SCHEMA_VERSION, Kind

METRICS_PORT = 9400
"""Port on which every worker serves /metrics (Prometheus), /progress (JSON) and /healthz."""
RENDEZVOUS_PORT = 29500
"""Port of the rendezvous store, on the worker of index 0; a single worker has none."""
TERMINATION_MESSAGE_BYTES = 4096
"""Longest termination message, in bytes; the kubelet truncates a longer one, which would break the JSON."""
WATCHDOG_INTERVAL_SECONDS = 5.0
"""Seconds between two checks of a worker's watchdog: workers that stall together exit within so long of each other."""
Phase = Literal["starting", "running", "checkpointing", "evaluating", "stopping", "finished"]
"""Phase of a rank; the watchdog allows more time in some phases."""


class ExitCode(enum.IntEnum):
    """Exit codes of a worker's container. It is the code of the rank that failed first, or the worker's own."""

    OK = 0
    """The stage succeeded; the result is in the termination message of the worker of index 0."""
    CONFIG = 64
    """The settings can't work; another attempt with the same settings fails too."""
    DATA = 65
    """A shard or a sample is damaged or invalid; the message names it."""
    NON_FINITE = 66
    """The loss or the gradient norm is NaN or infinite; the next attempt skips the data of that step."""
    OUT_OF_MEMORY = 67
    """The accelerator or the container ran out of memory."""
    STALLED = 68
    """A rank sent no heartbeat for the stall timeout, or no rank was started in time."""
    STORAGE = 74
    """A volume is full or unavailable. To the operator it is a crash: after a backoff, a new attempt starts, whose pods
    mount the volume anew. The number is EX_IOERR of <sysexits.h>."""
    PREEMPTED = 75
    """SIGTERM arrived and a checkpoint was saved, or there was no work to lose; or a later attempt superseded this
    one."""
    PEER_LOST = 76
    """The connection to another worker or rank was lost; the cause is the other one's error."""
    TERMINATED = 143
    """SIGTERM arrived and no checkpoint was saved within the grace period; steps are lost."""


NON_RETRYABLE_EXIT_CODES: frozenset[int] = frozenset(
    {ExitCode.CONFIG, ExitCode.DATA, ExitCode.NON_FINITE, ExitCode.PREEMPTED, ExitCode.STORAGE}
)
"""Exit codes of ranks after which restarting the ranks in place can't help."""


class Env(enum.StrEnum):
    """Environment variables of a worker's container. STAGE_FILE is required, RENDEZVOUS_SECRET for several workers."""

    STAGE_FILE = "SAILVL_STAGE_FILE"
    """Path of the stage config (`Stage` as JSON)."""
    NODES = "SAILVL_NODES"
    """Number of workers of the attempt. Default 1."""
    NODE_RANK = "SAILVL_NODE_RANK"
    """Index of this worker, 0 <= index < nodes. Default 0."""
    NODE_NAME = "SAILVL_NODE_NAME"
    """Name of the machine, for logs and messages. Default: empty."""
    PROCESSES_PER_NODE = "SAILVL_PROCESSES_PER_NODE"
    """Number of ranks per worker: its GPUs, or 1 on the CPU. Default 1."""
    DEVICE = "SAILVL_DEVICE"
    """Device that ranks use: cuda or cpu. Default cpu."""
    RENDEZVOUS_HOST = "SAILVL_RENDEZVOUS_HOST"
    """Host name or address of the worker of index 0; a single worker needs none. Default localhost."""
    RENDEZVOUS_PORT = "SAILVL_RENDEZVOUS_PORT"
    """Port of the rendezvous store. Default RENDEZVOUS_PORT."""
    RENDEZVOUS_SECRET = "SAILVL_RENDEZVOUS_SECRET"
    """Random text, the same for all workers of an attempt, with which the keys of the rendezvous store begin. It makes
    them hard to guess, but the store has no authentication. Required if there are several workers."""
    POD_IP = "SAILVL_POD_IP"
    """Address of this worker's pod, on which the rendezvous store listens if the worker has index 0 and isn't the only
    one. Default: loopback if RENDEZVOUS_HOST is, else all addresses."""
    METRICS_PORT = "SAILVL_METRICS_PORT"
    """Port of the worker's HTTP server, before the offset below. Default METRICS_PORT."""
    METRICS_PORT_OFFSET = "SAILVL_METRICS_PORT_OFFSET"
    """Number added to METRICS_PORT: workers that share a machine set it to their index. Default 0."""
    IN_PLACE_RESTARTS = "SAILVL_IN_PLACE_RESTARTS"
    """How often the ranks may be restarted within the attempt, without a new pod. Default 0."""
    GRACE_SECONDS = "SAILVL_GRACE_SECONDS"
    """Seconds between SIGTERM and the worker's exit, in which the ranks save a checkpoint. Default 30."""
    STALL_TIMEOUT_SECONDS = "SAILVL_STALL_TIMEOUT_SECONDS"
    """Seconds without a heartbeat of a rank after which the worker exits with STALLED. Default 0: never."""
    TERMINATION_LOG = "SAILVL_TERMINATION_LOG"
    """Path of the termination message. Default /dev/termination-log."""
    SCRATCH = "SAILVL_SCRATCH"
    """Writable directory that only this worker uses and that is lost with it. Default /tmp/sailvl."""


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
    """Seconds of this attempt by activity: starting, training, dataWait, checkpoint, evaluating, waiting for other
    ranks, and the names of tasks that ranks share."""
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
