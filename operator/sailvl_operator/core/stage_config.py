"""Translate stages of the spec to the contract's stage config: defaults are filled in, strings become numbers.

The guide's recipe page lists the defaults and says which of them the paper gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.benchmarks import BENCHMARKS
from sailvl_operator.api.stages import Curate, Evaluate, Sft, Source, Training
from sailvl_operator.api.types import EngineSpec, Model, Spec, StageSpec, Workers
from sailvl_operator.core.desired.workload import count_gpus
from sailvl_operator.core.units import parse_count
from sailvl_trainer import contract

Locate = Callable[[str], str]
"""Maps the name of a stage to the directory of its result, or to its digest when a digest is built."""
Resolve = Callable[[str], str]
"""Maps a path of the spec to a path of the worker."""


def merge_workers(spec: Spec, stage: StageSpec) -> Workers:
    """Merge the workers of a stage over those of the run and the defaults, field by field."""
    merged: dict[str, Any] = {"nodes": 1, "gpus_per_node": 8}
    for workers in (spec.workers, stage.workers):
        merged |= {f: v for f in workers.__struct_fields__ if (v := getattr(workers, f)) is not UNSET}
    return Workers(**merged)


def build_model(model: Model, resolve: Resolve) -> contract.ModelConfig:
    """Build the model config; pretrained components become paths of the worker."""
    return contract.ModelConfig(
        preset=model.preset,
        vision=None if model.vision is UNSET else resolve(model.vision),
        language=None if model.language is UNSET else resolve(model.language),
    )


def build_engine(engine: EngineSpec) -> contract.EngineConfig:
    """Build the config of the training engine."""
    return contract.EngineConfig(name=engine.name, zero_stage=engine.zero_stage)


def build_settings(spec: Spec, stage: StageSpec, locate: Locate, resolve: Resolve) -> dict[str, Any]:
    """Build the settings of a stage's kind as the one argument of contract.Stage that holds them."""
    if stage.curate is not UNSET:
        return {"curate": build_curate(stage.curate, resolve)}
    if stage.evaluate is not UNSET:
        return {"evaluate": build_evaluate(stage.evaluate, resolve)}
    training = stage.pretrain if stage.pretrain is not UNSET else stage.sft
    assert training is not UNSET, "the schema requires exactly one kind"
    gpus = count_gpus(merge_workers(spec, stage))
    preset, components = spec.model.preset, training.train
    train = build_train(training, train=components, preset=preset, gpus=gpus, locate=locate, resolve=resolve)
    return {"train": train}


def build_curate(curate: Curate, resolve: Resolve) -> contract.CurateConfig:
    """Build the settings of a curate stage."""
    return contract.CurateConfig(
        sources=tuple(_build_source(source, resolve) for source in curate.sources),
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
    """Build the settings of a pretrain or sft stage; `train` are the components whose parameters are trained."""
    is_tiny, is_connector_only = preset == "tiny", train == ("connector",)
    batch_tokens = "4096" if is_tiny else "4M" if is_connector_only else "1M"
    rate = "2e-4" if is_connector_only else "1e-5" if isinstance(training, Sft) else "2e-5"
    return contract.TrainConfig(
        train=train,
        data=tuple(locate(d.from_) if d.from_ is not UNSET else resolve(str(d.path)) for d in training.data),
        learning_rate=float(_default(training.learning_rate, rate)),
        tokens=None if training.tokens is UNSET else parse_count(training.tokens),
        epochs=None if training.epochs is UNSET else float(training.epochs),
        batch_tokens=parse_count(_default(training.batch_tokens, batch_tokens)),
        pack_tokens=parse_count(_default(training.pack_tokens, "1024" if is_tiny else "16384")),
        pack_tiles=training.pack_tiles,
        max_tiles=training.max_tiles,
        warmup_ratio=float(training.warmup),
        weight_decay=float(training.weight_decay),
        clip_norm=float(training.clip_norm),
        precision=_default(training.precision, "bf16" if gpus else "fp32"),
        checkpoint_steps=training.checkpoint_steps,
        held_out_samples=training.held_out_samples,
    )


def build_evaluate(evaluate: Evaluate, resolve: Resolve) -> contract.EvaluateConfig:
    """Build the settings of an evaluate stage: the named benchmarks from the table, then the custom ones."""
    selected = tuple(BENCHMARKS) if "all" in evaluate.benchmarks else evaluate.benchmarks
    folder = str(_default(evaluate.data, f"{names.STORAGE_MOUNT}/benchmarks"))
    named = tuple(
        contract.BenchmarkConfig(
            name=name,
            path=resolve(f"{folder}/{name}.tsv"),
            metric=BENCHMARKS[name].metric,
            group=BENCHMARKS[name].group,
            max_tiles=BENCHMARKS[name].max_tiles,
            scale=BENCHMARKS[name].scale,
        )
        for name in selected
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


def _build_source(source: Source, resolve: Resolve) -> contract.SourceConfig:
    path = "" if source.path is UNSET else resolve(source.path)
    return contract.SourceConfig(
        path=path,
        format=source.format,  # type: ignore[arg-type]  # `unsupported` rejects other formats
        name=_default(source.name, path.rstrip("/").rsplit("/", 1)[-1] or source.format),
        samples=_default(source.samples, 0),
        level=source.level,
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is UNSET else value
