"""What the operator and the trainer must agree on; pure standard library, imported by both.

The operator writes a `Stage` document for every attempt; the trainer answers with `Progress` while it runs, and
with a `Termination` (and in it a `Result`) when it ends. All documents are JSON with the field names below.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

SCHEMA_VERSION = 1
"""Version of the documents below; a worker refuses another one with ExitCode.CONFIG."""

RECIPE_VERSION = "1"
"""Part of every stage's digest: raised when the same settings give another result."""

METRICS_PORT = 9400
"""Every worker serves /metrics (Prometheus), /progress (JSON) and /healthz here."""
RENDEZVOUS_PORT = 29500
"""torch's rendezvous store, on the worker of index 0."""

TERMINATION_MESSAGE_BYTES = 4096
"""The kubelet cuts a longer termination message, which would break the JSON."""

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
ATTEMPTS_DIR = "attempts"
CHECKPOINTS_DIR = "checkpoints"
EXPORT_DIR = "export"
SHARDS_DIR = "shards"
HELD_OUT_DIR = "held-out"
REPORT_DIR = "report"
RESULTS_DIR = "results"

Kind = Literal["curate", "pretrain", "sft", "evaluate"]
Part = Literal["vision", "connector", "language"]
Metric = Literal[
    "exact_match", "multiple_choice", "vqa_accuracy", "relaxed_accuracy", "anls", "yes_no_f1", "caption_loss"
]
Phase = Literal["starting", "running", "checkpointing", "evaluating", "stopping", "finished"]


class ExitCode(enum.IntEnum):
    """How a worker ends. A rank's final code becomes the code of its container."""

    OK = 0
    CONFIG = 64
    """The settings can't work; starting again can't help."""
    DATA = 65
    """A shard or a record is unreadable; the message names it."""
    NON_FINITE = 66
    """The loss or a gradient is NaN or infinite."""
    OUT_OF_MEMORY = 67
    """The accelerator is out of memory."""
    STALLED = 68
    """No heartbeat for stall_timeout_seconds."""
    STORAGE = 74
    """A volume is full, missing or broken. To the operator it is a crash: a new attempt, whose pods mount the volume
    anew, starts after a backoff. The number is EX_IOERR of <sysexits.h>."""
    PREEMPTED = 75
    """SIGTERM arrived and a checkpoint was saved."""
    PEER_LOST = 76
    """Another worker is gone; not this worker's fault."""
    TERMINATED = 143
    """SIGTERM arrived and no checkpoint was saved within the grace."""


WATCHDOG_INTERVAL_SECONDS = 5.0
"""Between two looks of a worker's watchdog: workers that stall together end within so long of each other."""

NON_RETRYABLE_EXIT_CODES: frozenset[int] = frozenset(
    {ExitCode.CONFIG, ExitCode.DATA, ExitCode.NON_FINITE, ExitCode.PREEMPTED, ExitCode.STORAGE}
)
"""Codes after which starting the same processes again in place can't help."""


class Env(enum.StrEnum):
    """The environment of a worker's container."""

    STAGE_FILE = "SAILVL_STAGE_FILE"
    """Path of the Stage document."""
    NODES = "SAILVL_NODES"
    """Workers of the attempt."""
    NODE_RANK = "SAILVL_NODE_RANK"
    """Index of this worker, 0 <= index < nodes."""
    NODE_NAME = "SAILVL_NODE_NAME"
    """The machine's name, for logs and messages."""
    PROCESSES_PER_NODE = "SAILVL_PROCESSES_PER_NODE"
    """Ranks a worker: its GPUs, or 1 on the CPU."""
    DEVICE = "SAILVL_DEVICE"
    """cuda or cpu."""
    RENDEZVOUS_HOST = "SAILVL_RENDEZVOUS_HOST"
    """Address of the worker of index 0."""
    RENDEZVOUS_PORT = "SAILVL_RENDEZVOUS_PORT"
    """Default RENDEZVOUS_PORT."""
    METRICS_PORT = "SAILVL_METRICS_PORT"
    """Default METRICS_PORT."""
    METRICS_PORT_OFFSET = "SAILVL_METRICS_PORT_OFFSET"
    """Added to the port: workers that share a machine set it to their index. Default 0."""
    IN_PLACE_RESTARTS = "SAILVL_IN_PLACE_RESTARTS"
    """How often the ranks are started again within the attempt."""
    GRACE_SECONDS = "SAILVL_GRACE_SECONDS"
    """Between SIGTERM and the end; a checkpoint is saved within it."""
    STALL_TIMEOUT_SECONDS = "SAILVL_STALL_TIMEOUT_SECONDS"
    """Without a heartbeat for so long the worker ends with STALLED; 0: never."""
    TERMINATION_LOG = "SAILVL_TERMINATION_LOG"
    """Path of the termination message."""
    SCRATCH = "SAILVL_SCRATCH"
    """A folder of this worker alone, writable, lost with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model a run trains."""

    preset: str
    """tiny, sail-vl-2b, sail-vl-8b or sail-vl2-2b."""
    vision: str | None = None
    """Folder or hub id of a pretrained vision tower; None: random weights."""
    language: str | None = None
    """Folder or hub id of a pretrained language model; None: random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How parameters and optimizer states are spread over the ranks."""

    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    zero_stage: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One raw data set to curate."""

    path: str
    format: Literal["imagefolder", "webdataset", "procedural"]
    """imagefolder: pictures with NAME.txt beside them or a captions.jsonl; webdataset: a tar, or a folder of tars;
    procedural: no files, `path` is ignored and `samples` are drawn."""
    name: str = ""
    """Shown in the report; default: the last part of the path."""
    samples: int = 0
    """procedural: how many samples to draw; other formats: at most so many (0: all)."""
    level: int = 1
    """procedural: difficulty 1..3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateConfig:
    """Raw data sets in, verified and deduplicated shards out."""

    sources: tuple[SourceConfig, ...]
    min_side: int = 28
    """Pixels; smaller pictures are dropped."""
    max_pixels: int = 178_956_970
    """Larger pictures are dropped unread: decompression bombs."""
    exact_duplicates: bool = True
    """Drop a picture whose decoded pixels were seen before."""
    perceptual_distance: int = 4
    """Drop a picture within so many bits of 64 of one seen before; -1: keep."""
    held_out_fraction: float = 0.02
    """Part of the kept samples written to HELD_OUT_DIR, chosen by hash."""
    shard_samples: int = 1024
    """Samples a shard, at most."""
    max_tiles: int = 12
    """Tiles a picture, for the token counts of the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Pretraining or supervised fine-tuning: they differ in their defaults only."""

    train: tuple[Part, ...]
    """Which parts learn; the others are frozen."""
    data: tuple[str, ...]
    """Directories that hold shards and a manifest (a curate stage's output, or a prepared set)."""
    learning_rate: float
    tokens: int | None = None
    """Budget in language-model positions, padding not counted; exactly one of tokens and epochs."""
    epochs: float | None = None
    batch_tokens: int
    """Tokens an optimizer step, over all ranks."""
    pack_tokens: int
    """Length of a packed sequence, at most."""
    pack_tiles: int
    """Tiles a packed sequence, at most."""
    max_tiles: int = 12
    """Tiles a picture, at most."""
    warmup_ratio: float = 0.03
    min_learning_rate_ratio: float = 0.0
    """Where the cosine ends, as a part of learning_rate."""
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpoint_steps: int = 500
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    held_out_samples: int = 256
    """Held-out samples for the held-out loss, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """One benchmark: a VLMEvalKit-style TSV and how it is scored."""

    name: str
    path: str
    """The TSV, or for caption_loss a directory of held-out shards."""
    metric: Metric
    group: str
    """Means are taken by group."""
    max_tiles: int = 6
    scale: float = 1.0
    """The raw score is multiplied by it to give 0..100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score one exported model on benchmarks, greedily."""

    benchmarks: tuple[BenchmarkConfig, ...]
    limit: int = 0
    """Questions a benchmark, at most; 0: all."""
    max_new_tokens: int = 64
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The stage document: all that an attempt needs to know."""

    schema_version: int = SCHEMA_VERSION
    namespace: str
    run: str
    stage: str
    kind: Kind
    attempt: int
    """1, 2, …"""
    digest: str
    """Hex SHA-256 of what changes the result."""
    storage: str
    """Root of the shared storage."""
    output: str
    """Directory of this stage: <storage>/<run>/<stage>-<digest12>."""
    seed: int = 0
    start_timeout_seconds: int = 0
    """For which workers may wait for each other to be started; 0: for ever."""
    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    init_from: str | None = None
    """Directory of the training stage (its EXPORT_DIR is read) that this one starts from or evaluates."""
    curate: CurateConfig | None = None
    train: TrainConfig | None = None
    evaluate: EvaluateConfig | None = None
    """Exactly one of curate, train, evaluate, by `kind`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    step: int
    path: str
    """Relative to the storage root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Served on /progress by every worker; the worker of global rank 0 has the full one."""

    attempt: int
    phase: Phase
    step: int = 0
    """Optimizer steps, samples or questions done, counting those before a resume."""
    steps: int = 0
    """How many there will be; 0: not known yet."""
    unit: Literal["steps", "samples", "questions"] = "steps"
    tokens: int = 0
    samples: int = 0
    lost_steps: int = 0
    """Optimizer steps done in vain by all attempts of the stage so far: the work went on from before them."""
    in_place_restarts: int = 0
    """How often this attempt's ranks were started again."""
    eta_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Latest values, e.g. loss, learning_rate, tokens_per_second."""
    checkpoint: Checkpoint | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of this attempt by activity: starting, training, dataWait, checkpoint, evaluating."""
    time: float = 0.0
    """Unix seconds of this document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """RESULT_FILE of a stage that succeeded."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    kind: Kind
    digest: str
    attempt: int
    output: str
    """Relative to the storage root."""
    steps: int = 0
    tokens: int = 0
    samples: int = 0
    lost_steps: int = 0
    """Optimizer steps done in vain by all attempts."""
    seconds: float = 0.0
    """Wall clock of the attempt that finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """For gates and status, e.g. heldOutLoss, heldOutLossBefore, heldOutLossShuffled, skippedSamples, score, kept,
    dropped."""
    reused: bool = False
    """The result was found, not computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Termination:
    """A container's termination message, at most TERMINATION_MESSAGE_BYTES of JSON."""

    exit_code: int
    rank: int | None = None
    """The rank to blame, if one is."""
    message: str = ""
    """One line for people; says what to change."""
    traceback: str = ""
    """The last lines of the rank's traceback."""
    checkpoint: Checkpoint | None = None
    """The newest that this worker knows of."""
    result: Result | None = None
    """Of the worker of index 0, on success."""
    superseded_by: int = 0
    """The attempt that has claimed the stage and cut this one off; 0: none has."""
    ranks_started: bool = True
    """Whether this worker had started a rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Optimizer steps whose data is left out, since the loss or the gradient was no number there."""

    first: int
    """From 1."""
    last: int
    step: int
    """Where it failed first."""
    failures: int
    """How often it has failed there; the range grows with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """ATTEMPTS_DIR/<attempt>.non-finite.json: why an attempt ended with NON_FINITE; what the next one leaves out."""

    attempt: int
    step: int
    """The optimizer step that failed, from 1; it is in no checkpoint."""
    quantity: str
    """loss or gradient norm."""
    value: str
    """nan, inf or -inf."""
    samples: tuple[int, ...]
    """Of that step, as the ledger numbers them."""
    max_resume_step: int
    """The next attempt starts from the newest checkpoint of at most so many steps."""
    skips: tuple[Skip, ...]
    """All that the next attempt leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """ATTEMPTS_DIR/<attempt>.json: what a cut-off older attempt still writes is off the chain.

    Created exclusively, and empty at first: from then on no older attempt saves, removes or ends anything.
    """

    attempt: int
    start: Checkpoint | None
    """The checkpoint this attempt starts from; None: from the stage's beginning."""
    skips: tuple[Skip, ...] = ()
    """What this attempt leaves out."""
