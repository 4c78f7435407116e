"""The part of the spec that describes a curate stage: sources, captions, deduplication and sharding.

The docstring under a field is its description in the schema and in the reference.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import Decimal, Path, Server, Struct, Weights


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
