"""The parts of the spec that describe what a stage does, one class for each kind of stage.

The kinds are curate, pretrain, sft and evaluate; the benchmarks that evaluate knows by name are in `benchmarks.py`.
The docstring under a field is its description in the schema and in the reference.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import BY_NAME, SET, Count, Decimal, Name, Parts, Path, Server, Struct, Weights


class Source(Struct, frozen=True, kw_only=True):
    """A raw data set.

    imagefolder is a directory of images with NAME.txt beside each image, or with a captions.jsonl; webdataset is a
    directory of tar files; procedural draws synthetic images and needs no path.
    """

    format: Literal["imagefolder", "webdataset", "procedural", "parquet", "jsonl"]
    """Storage format of the data set."""
    path: Path | UnsetType = UNSET
    """Absolute path of the data set on the storage. Required for every format except procedural, which must not set
    it."""
    name: Annotated[str, Meta(max_length=63)] | UnsetType = UNSET
    """Name of the source in the curation report. Defaults to the last component of path."""
    samples: Annotated[int, Meta(ge=1, le=1_000_000_000)] | UnsetType = UNSET
    """Maximum number of samples to read; for procedural, the number of samples to draw, which is required. Defaults to
    all samples of the source."""
    level: Annotated[int, Meta(ge=1, le=3)] = 1
    """Difficulty of procedural samples, from 1 (easy) to 3 (hard). Ignored for other formats."""


class Caption(Struct, frozen=True, kw_only=True):
    """Source of the captions."""

    mode: Literal["keep", "caption", "recaption"] = "keep"
    """keep uses the alt-text of the source; caption generates one from the image alone; recaption generates one from
    the image and its alt-text."""
    model: Weights | UnsetType = UNSET
    """Captioning model that runs in the workers: a directory on the storage or a Hugging Face Hub ID."""
    server: Server | UnsetType = UNSET
    """URL of an OpenAI-compatible server that generates the captions."""


class Judge(Struct, frozen=True, kw_only=True):
    """Language model that scores captions for information richness and alignment with the image."""

    model: Weights | UnsetType = UNSET
    """Judge model that runs in the workers: a directory on the storage or a Hugging Face Hub ID."""
    server: Server | UnsetType = UNSET
    """URL of an OpenAI-compatible server that scores the captions."""
    at_least: Annotated[int, Meta(ge=1, le=5)] = 3
    """Minimum score, from 1 to 5. Samples with a lower score are dropped."""


class Dedup(Struct, frozen=True, kw_only=True):
    """Deduplication of images across all sources of the stage."""

    exact: bool = True
    """Drop images whose pixels equal those of an earlier image."""
    perceptual_distance: Annotated[int, Meta(ge=-1, le=16)] = 4
    """Maximum Hamming distance, in bits of a 64-bit perceptual hash, at which an image counts as a near-duplicate and
    is dropped; -1 disables near-duplicate detection."""


class Balance(Struct, frozen=True, kw_only=True):
    """Resampling of captions with over-represented n-grams."""

    ngram: Annotated[int, Meta(ge=1, le=5)] = 2
    """Length of an n-gram."""


class Curate(Struct, frozen=True, kw_only=True):
    """Data curation: reads raw data sets and writes verified, deduplicated shards."""

    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=32)]
    """Raw data sets to read."""
    caption: Caption = Caption()
    """Source of the captions. Defaults to the alt-text of the sources."""
    judge: Judge | UnsetType = UNSET
    """Language model that filters captions by quality. Defaults to no filtering."""
    dedup: Dedup = Dedup()
    """Criteria for duplicate images."""
    balance: Balance | UnsetType = UNSET
    """Resampling by n-gram frequency. Defaults to no resampling."""
    min_side: Annotated[int, Meta(ge=1, le=4096)] = 28
    """Minimum length of an image's shorter side, in pixels; smaller images are dropped."""
    held_out_fraction: Decimal = "0.02"
    """Fraction of the samples, less than 1, that is excluded from training and used to compute the held-out loss."""
    shard_samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    """Maximum number of samples per shard."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 12
    """Maximum number of tiles per image when token counts are computed for the shard index. Set it to the maxTiles of
    the training stages that read the shards."""


class DataInput(Struct, frozen=True, kw_only=True):
    """Training data: the output of a curate stage (from) or a directory of shards (path)."""

    from_: Name | UnsetType = msgspec.field(default=UNSET, name="from")
    """Name of an earlier curate stage of this run."""
    path: Path | UnsetType = UNSET
    """Absolute path of a directory of shards on the storage."""


class Training(Struct, frozen=True, kw_only=True):
    """Settings shared by pretrain and sft. Exactly one of tokens and epochs sets the length of the training."""

    data: Annotated[tuple[DataInput, ...], Meta(min_length=1, max_length=16)]
    """Training data. All inputs are shuffled together."""
    tokens: Count | UnsetType = UNSET
    """Length of the training in tokens, that is positions of the language model without padding."""
    epochs: Decimal | UnsetType = UNSET
    """Length of the training in passes over the data; may be fractional."""
    learning_rate: Decimal | UnsetType = UNSET
    """Peak learning rate. Defaults to 2e-4 if only the connector is trained, 2e-5 for other pretrain stages, and 1e-5
    for sft stages."""
    schedule: Literal["cosine", "adalrs"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup: Decimal = "0.03"
    """Fraction of the training, less than 1, over which the learning rate rises linearly from 0 to its peak."""
    weight_decay: Decimal = "0.05"
    """Weight decay of AdamW."""
    clip_norm: Decimal = "1.0"
    """Maximum norm of the gradient; larger gradients are scaled down to it."""
    batch_tokens: Count | UnsetType = UNSET
    """Number of tokens per optimizer step, over all workers. Defaults to 4M if only the connector is trained and to 1M
    otherwise; the tiny preset defaults to 4096."""
    pack_tokens: Count | UnsetType = UNSET
    """Maximum number of tokens per packed sequence. Defaults to 16384; the tiny preset defaults to 1024."""
    pack_tiles: Annotated[int, Meta(ge=1, le=1024)] = 48
    """Maximum number of image tiles per packed sequence."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 12
    """Maximum number of tiles per image."""
    precision: Literal["bf16", "fp32"] | UnsetType = UNSET
    """Floating-point type of the forward and backward pass. Defaults to bf16 on GPUs and fp32 on CPUs."""
    checkpoint_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 500
    """Number of optimizer steps between checkpoints."""
    held_out_samples: Annotated[int, Meta(ge=0, le=1_000_000)] = 256
    """Maximum number of held-out samples used to compute the held-out loss; 0 computes none."""


class Pretrain(Training, frozen=True, kw_only=True):
    """Multimodal pretraining on captions."""

    train: Parts = ("connector",)
    """Parts of the model whose parameters are trained; the other parts are frozen."""


class Sft(Training, frozen=True, kw_only=True):
    """Supervised fine-tuning on conversations."""

    train: Parts = ("vision", "connector", "language")
    """Parts of the model whose parameters are trained; the other parts are frozen."""


class CustomBenchmark(Struct, frozen=True, kw_only=True):
    """Benchmark that is not built in."""

    name: Name
    """Name of the benchmark; the key of its score in status.stages[].metrics."""
    path: Path
    """Absolute path of a TSV file in the format of VLMEvalKit on the storage; for caption_loss, of a directory of
    shards."""
    metric: Literal[
        "exact_match",
        "multiple_choice",
        "vqa_accuracy",
        "relaxed_accuracy",
        "anls",
        "yes_no_f1",
        "caption_loss",
    ]
    """Metric that scores the answers."""
    group: Annotated[str, Meta(min_length=1, max_length=30)] = "Custom"
    """Group of the benchmark. Scores are averaged per group."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 6
    """Maximum number of tiles per image."""


class Evaluate(Struct, frozen=True, kw_only=True):
    """Evaluation of the model of the preceding training stage on benchmarks, with greedy decoding."""

    benchmarks: Annotated[
        tuple[Annotated[str, Meta(max_length=30)], ...], Meta(max_length=32, extra_json_schema=SET)
    ] = ()
    """Names of built-in benchmarks, or all for every one of them. Each is read from <data>/<name>.tsv."""
    data: Path | UnsetType = UNSET
    """Absolute path of the directory with the TSV files of the built-in benchmarks. Required if benchmarks is set."""
    custom: Annotated[tuple[CustomBenchmark, ...], Meta(max_length=32, extra_json_schema=BY_NAME)] = ()
    """Additional benchmarks."""
    limit: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Maximum number of questions per benchmark; 0 means all."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Maximum number of tokens to generate per answer."""
