"""Builds what a training stage needs before its first step: tokenizer, model, datasets, planner, number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.contract import EXPORT_DIR, HELD_OUT_DIR, MANIFEST_FILE, SHARDS_DIR, TrainConfig
from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.planner import Planner, build_planner
from sailvl_trainer.model.build import build_model, set_trainable
from sailvl_trainer.model.presets import Preset, get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.file_verification import verify_input
from sailvl_trainer.storage.export_manifest import list_export_files
from sailvl_trainer.train.dataset_cache import open_dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """Equal on every rank."""

    preset: Preset
    tokenizer: PreTrainedTokenizerFast
    model: InternVLForConditionalGeneration
    trainable_names: list[str]
    """Names of the trainable parameters."""
    encoder: SampleEncoder
    dataset: ShardDataset
    validation_set: ShardDataset | None
    """Samples held out from training; None if no data directory has any."""
    planner: Planner
    steps: int
    """Optimizer steps of the budget."""


def prepare(context: Context, config: TrainConfig) -> TrainingSetup:
    """Build everything that training needs. COLLECTIVE.

    Raises ConfigError for settings that can't work, DataError for data that can't be used.
    """
    stage = context.stage
    init_from = None if stage.init_from is None else Path(stage.init_from) / EXPORT_DIR
    if init_from is not None:
        verify_export(context, init_from)
    tokenizer, preset = load_tokenizer(stage.model, init_from), get_preset(stage.model.preset)
    model = build_model(stage.model, tokenizer, init_from=init_from, seed=stage.seed)
    encoder = SampleEncoder(
        tokenizer=tokenizer, preset=preset, max_tiles=config.max_tiles, pack_tokens=config.pack_tokens
    )
    folders = [Path(path) for path in config.data]
    dataset = open_dataset(context, folders, SHARDS_DIR, encoder)
    planner = build_planner(
        dataset,
        pack_tokens=config.pack_tokens,
        pack_tiles=config.pack_tiles,
        packs_per_step=max(1, round(config.batch_tokens / config.pack_tokens)),
    )
    return TrainingSetup(
        preset=preset,
        tokenizer=tokenizer,
        model=model,
        trainable_names=set_trainable(model, config.train),
        encoder=encoder,
        dataset=dataset,
        validation_set=_open_validation_set(context, folders, encoder),
        planner=planner,
        steps=planner.num_steps(stage.seed, epochs=config.epochs, tokens=config.tokens),
    )


def verify_export(context: Context, folder: Path) -> None:
    """Verify the hashes of an export that this run didn't write. COLLECTIVE. Raises DataError if a file differs."""
    if not context.files.is_from_this_run(folder):
        files = list_export_files(folder, context.files.storage)
        verify_input(context, files, advice="train the stage that wrote it again, or set another initFrom")


def _open_validation_set(context: Context, folders: list[Path], encoder: SampleEncoder) -> ShardDataset | None:
    with_held_out = [folder for folder in folders if (folder / HELD_OUT_DIR / MANIFEST_FILE).exists()]
    dataset = open_dataset(context, with_held_out, HELD_OUT_DIR, encoder) if with_held_out else None
    return dataset if dataset is not None and len(dataset) else None
