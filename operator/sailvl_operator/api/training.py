"""The part of the spec that describes the training stages, pretrain and sft.

The docstring under a field is its description in the schema and in the reference.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import Count, Decimal, Name, Parts, Path, Struct


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
    """Maximum number of held-out samples used to compute the held-out loss."""


class Pretrain(Training, frozen=True, kw_only=True):
    """Multimodal pretraining on captions."""

    train: Parts = ("connector",)
    """Parts of the model whose parameters are trained; the other parts are frozen."""


class Sft(Training, frozen=True, kw_only=True):
    """Supervised fine-tuning on conversations."""

    train: Parts = ("vision", "connector", "language")
    """Parts of the model whose parameters are trained; the other parts are frozen."""
