"""The spec's stages as the contract's settings: defaults filled in, counts and decimals turned into numbers.

A default that the paper doesn't give is DESIGN's choice; see the recipe's table in the guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.benchmarks import BENCHMARKS
from sailvl_operator.api.curation import Curate, Source
from sailvl_operator.api.training import Sft, Training
from sailvl_operator.api.types import Engine, Evaluate, Model, Spec, Stage, Workers
from sailvl_operator.core.units import parse_count
from sailvl_trainer import contract

Locate = Callable[[str], str]
"""Name of a stage to its directory (or, for a digest, to that stage's digest)."""
Resolve = Callable[[str], str]
"""A path of the spec to a path in the worker."""


def merge_workers(spec: Spec, stage: Stage) -> Workers:
    """The stage's workers over the run's over the defaults, field by field."""
    merged: dict[str, Any] = {"nodes": 1, "gpus_per_node": 8}
    for workers in (spec.workers, stage.workers):
        merged |= {f: v for f in workers.__struct_fields__ if (v := getattr(workers, f)) is not UNSET}
    return Workers(**merged)


def build_model(model: Model, resolve: Resolve) -> contract.ModelConfig:
    """The model, its pretrained parts as paths in the worker."""
    parts = {part: None if path is UNSET else resolve(path) for part, path in _parts(model)}
    return contract.ModelConfig(preset=model.preset, **parts)


def build_engine(engine: Engine) -> contract.EngineConfig:
    """The engine as the trainer knows it."""
    return contract.EngineConfig(name=engine.name, zero_stage=engine.zero_stage)


def build_curate(curate: Curate, resolve: Resolve) -> contract.CurateConfig:
    """A curate stage's settings."""
    return contract.CurateConfig(
        sources=tuple(_source(source, resolve) for source in curate.sources),
        min_side=curate.min_side,
        exact_duplicates=curate.dedup.exact,
        perceptual_distance=curate.dedup.perceptual_distance,
        held_out_fraction=float(curate.held_out_fraction),
        shard_samples=curate.shard_samples,
        max_tiles=curate.max_tiles,
    )


def build_train(
    training: Training, *, train: tuple[contract.Part, ...], preset: str, gpus: int, locate: Locate, resolve: Resolve
) -> contract.TrainConfig:
    """A pretrain or sft stage's settings."""
    is_tiny, is_connector_only = preset == "tiny", train == ("connector",)
    batch_tokens = "4096" if is_tiny else "4M" if is_connector_only else "1M"
    rate = "2e-4" if is_connector_only else "1e-5" if isinstance(training, Sft) else "2e-5"
    return contract.TrainConfig(
        train=train,
        data=tuple(locate(d.from_) if d.from_ is not UNSET else resolve(str(d.path)) for d in training.data),
        learning_rate=float(_or(training.learning_rate, rate)),
        tokens=None if training.tokens is UNSET else parse_count(training.tokens),
        epochs=None if training.epochs is UNSET else float(training.epochs),
        batch_tokens=parse_count(_or(training.batch_tokens, batch_tokens)),
        pack_tokens=parse_count(_or(training.pack_tokens, "1024" if is_tiny else "16384")),
        pack_tiles=training.pack_tiles,
        max_tiles=training.max_tiles,
        warmup_ratio=float(training.warmup),
        weight_decay=float(training.weight_decay),
        clip_norm=float(training.clip_norm),
        precision=_or(training.precision, "bf16" if gpus else "fp32"),
        checkpoint_steps=training.checkpoint_steps,
        held_out_samples=training.held_out_samples,
    )


def build_evaluate(evaluate: Evaluate, resolve: Resolve) -> contract.EvaluateConfig:
    """An evaluate stage's settings: named benchmarks looked up in the table, then the custom ones."""
    asked = tuple(BENCHMARKS) if "all" in evaluate.benchmarks else evaluate.benchmarks
    folder = str(_or(evaluate.data, f"{names.STORAGE_MOUNT}/benchmarks"))
    named = tuple(
        contract.BenchmarkConfig(
            name=name,
            path=resolve(f"{folder}/{name}.tsv"),
            metric=BENCHMARKS[name].metric,
            group=BENCHMARKS[name].group,
            max_tiles=BENCHMARKS[name].max_tiles,
            scale=BENCHMARKS[name].scale,
        )
        for name in asked
    )
    custom = tuple(
        contract.BenchmarkConfig(
            name=b.name, path=resolve(b.path), metric=b.metric, group=b.group, max_tiles=b.max_tiles, scale=100.0
        )
        for b in evaluate.custom
    )
    return contract.EvaluateConfig(
        benchmarks=named + custom, limit=evaluate.limit, max_new_tokens=evaluate.max_new_tokens
    )


def _source(source: Source, resolve: Resolve) -> contract.SourceConfig:
    path = "" if source.path is UNSET else resolve(source.path)
    return contract.SourceConfig(
        path=path,
        format=source.format,  # type: ignore[arg-type]  # others are refused before
        name=_or(source.name, path.rstrip("/").rsplit("/", 1)[-1] or source.format),
        samples=_or(source.samples, 0),
        level=source.level,
    )


def _parts(model: Model) -> tuple[tuple[str, Any], ...]:
    return (("vision", model.vision), ("language", model.language))


def _or(value: Any, default: Any) -> Any:
    return default if value is UNSET else value
