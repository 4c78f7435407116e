"""The stage config: the document from which a worker learns what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SCHEMA_VERSION = 1
"""Version of the documents below; a worker refuses a stage config of another version with ExitCode.CONFIG."""
RECIPE_VERSION = "1"
"""Part of every stage's digest; it is raised when the same settings lead to another result."""
Kind = Literal["curate", "pretrain", "sft", "evaluate"]
"""Kind of a stage; pretrain and sft run the same code."""
Part = Literal["vision", "connector", "language"]
"""A component of the model: vision tower, connector, or language model."""
Metric = Literal[
    "exact_match", "multiple_choice", "vqa_accuracy", "relaxed_accuracy", "anls", "yes_no_f1", "caption_loss"
]
"""How a benchmark is scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model that a run trains."""

    preset: str
    """Name of the architecture: tiny, sail-vl-2b, sail-vl-8b or sail-vl2-2b."""
    vision: str | None = None
    """Directory or hub ID of a pretrained vision tower. Default None: random weights."""
    language: str | None = None
    """Directory or hub ID of a pretrained language model. Default None: random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How parameters and optimizer states are sharded over the ranks."""

    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """Training engine."""
    zero_stage: int = 1
    """DeepSpeed's ZeRO stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One raw data set to curate."""

    path: str
    """Directory or file of the data set; ignored for procedural."""
    format: Literal["imagefolder", "webdataset", "procedural"]
    """imagefolder: images, each with a NAME.txt, or all with one captions.jsonl. webdataset: a tar, or a directory of
    tars. procedural: no files; synthetic samples are generated."""
    name: str = ""
    """Name in the report. Default: the last component of the path."""
    samples: int = 0
    """procedural: number of samples to generate. Other formats: largest number of samples to read; 0 reads all."""
    level: int = 1
    """Difficulty of procedural samples, 1 to 3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateConfig:
    """Settings of a stage that turns raw data sets into verified, deduplicated shards."""

    sources: tuple[SourceConfig, ...]
    """The raw data sets; of duplicate images, the first one in this order is kept."""
    min_side: int = 28
    """Smallest width and height of an image in pixels; smaller images are dropped."""
    max_pixels: int = 178_956_970
    """Largest number of pixels of an image; larger ones are dropped undecoded, as possible decompression bombs."""
    exact_duplicates: bool = True
    """Whether to drop an image whose decoded pixels equal those of an earlier one."""
    perceptual_distance: int = 4
    """Drop an image whose 64-bit perceptual hash differs from an earlier one's in at most so many bits; -1 turns
    this off."""
    held_out_fraction: float = 0.02
    """Fraction of the remaining samples that is written to HELD_OUT_DIR; samples are chosen by hash."""
    shard_samples: int = 1024
    """Largest number of samples per shard."""
    max_tiles: int = 12
    """Largest number of tiles per image, for the token counts in the shards' index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of pretraining or supervised fine-tuning, which differ only in their defaults."""

    train: tuple[Part, ...]
    """Components of the model that are trained; the others are frozen."""
    data: tuple[str, ...]
    """Directories with shards and a manifest: the output of a curate stage, or a prepared data set."""
    learning_rate: float
    """Peak learning rate, reached after the warmup."""
    tokens: int | None = None
    """Budget in tokens of the language model, without padding. Exactly one of tokens and epochs is set."""
    epochs: float | None = None
    """Budget in passes over the data. Exactly one of tokens and epochs is set."""
    batch_tokens: int
    """Number of tokens per optimizer step, over all ranks."""
    pack_tokens: int
    """Largest number of tokens per pack."""
    pack_tiles: int
    """Largest number of tiles per pack."""
    max_tiles: int = 12
    """Largest number of tiles per image."""
    warmup_ratio: float = 0.03
    """Fraction of the steps in which the learning rate rises linearly from 0."""
    min_learning_rate_ratio: float = 0.0
    """Final learning rate of the cosine schedule, as a fraction of learning_rate."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Data type of the forward and backward pass."""
    checkpoint_steps: int = 500
    """Number of optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    held_out_samples: int = 256
    """Largest number of held-out samples for the validation loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """One benchmark and how it is scored."""

    name: str
    """Name of the benchmark, unique in the stage."""
    path: str
    """Path of a TSV file in VLMEvalKit's format or, for caption_loss, of a directory of held-out shards."""
    metric: Metric
    """How answers are scored."""
    group: str
    """Group of benchmarks over which a mean score is reported."""
    max_tiles: int = 6
    """Largest number of tiles per image."""
    scale: float = 1.0
    """Factor from the raw score to 0..100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of a stage that scores an exported model on benchmarks, with greedy decoding."""

    benchmarks: tuple[BenchmarkConfig, ...]
    """The benchmarks, in the order of the report."""
    limit: int = 0
    """Largest number of questions per benchmark; 0 asks all."""
    max_new_tokens: int = 64
    """Largest number of tokens per answer."""
    batch_size: int = 8
    """Number of questions per generation batch, per rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The stage config: everything that the workers of an attempt need to know."""

    schema_version: int = SCHEMA_VERSION
    """Version of this document."""
    namespace: str
    """Namespace of the run."""
    run: str
    """Name of the run."""
    stage: str
    """Name of the stage."""
    kind: Kind
    """Kind of the stage, which says which of curate, train and evaluate is set."""
    attempt: int
    """Number of the attempt, from 1."""
    digest: str
    """Hex SHA-256 of all settings that change the result; stages with equal digests share a result."""
    storage: str
    """Root directory of the shared storage."""
    output: str
    """Directory of this stage, below the storage: <storage>/<run>/<stage>-<first 12 characters of the digest>."""
    seed: int = 0
    """Seed of every random choice: initial weights, order of the data, samples of subsets."""
    start_timeout_seconds: int = 0
    """Seconds for which workers may wait for each other to start. Default 0: without limit."""
    model: ModelConfig
    """The model that the run trains."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How parameters and optimizer states are sharded."""
    init_from: str | None = None
    """Output of the training stage whose exported model this stage starts from or evaluates. Default None: the model's
    own weights."""
    curate: CurateConfig | None = None
    """Settings of a stage of kind curate."""
    train: TrainConfig | None = None
    """Settings of a stage of kind pretrain or sft."""
    evaluate: EvaluateConfig | None = None
    """Settings of a stage of kind evaluate."""
