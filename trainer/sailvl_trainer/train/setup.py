"""What a training stage needs before its first step: tokenizer, model, index, planner and the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.contract import EXPORT_DIR, HELD_OUT_DIR, MANIFEST_FILE, SHARDS_DIR, TrainConfig
from sailvl_trainer.data.dataset import Encoder, Index, build_index
from sailvl_trainer.data.planner import Planner, build_planner
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.freeze import set_trainable
from sailvl_trainer.model.presets import Preset, preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context

INDEX_DIR = "index"
"""Under the stage's directory: the samples' lengths, measured once for all ranks and attempts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    preset: Preset
    tokenizer: PreTrainedTokenizerFast
    model: InternVLForConditionalGeneration
    learning: list[str]
    """Names of the parameters that learn."""
    encoder: Encoder
    index: Index
    held_out: Index | None
    """None where no data set has held-out samples."""
    planner: Planner
    steps: int
    """Optimizer steps of the budget."""


def prepare(context: Context, config: TrainConfig) -> Prepared:
    """The same on every rank. Raises ConfigError or DataError for what can't be trained on."""
    stage = context.stage
    init_from = None if stage.init_from is None else Path(stage.init_from) / EXPORT_DIR
    tokenizer, preset_ = load_tokenizer(stage.model, init_from), preset(stage.model.preset)
    model = build_model(stage.model, tokenizer, init_from=init_from, seed=stage.seed)
    encoder = Encoder(tokenizer=tokenizer, preset=preset_, max_tiles=config.max_tiles, pack_tokens=config.pack_tokens)
    folders = [Path(path) for path in config.data]
    index = build_index(folders, SHARDS_DIR, encoder, cache=context.files.output / INDEX_DIR)
    planner = build_planner(
        index,
        pack_tokens=config.pack_tokens,
        pack_tiles=config.pack_tiles,
        packs_per_step=max(1, round(config.batch_tokens / config.pack_tokens)),
    )
    return Prepared(
        preset=preset_,
        tokenizer=tokenizer,
        model=model,
        learning=set_trainable(model, config.train),
        encoder=encoder,
        index=index,
        held_out=_build_held_out(folders, encoder),
        planner=planner,
        steps=planner.steps_for(stage.seed, epochs=config.epochs, tokens=config.tokens),
    )


def _build_held_out(folders: list[Path], encoder: Encoder) -> Index | None:
    having = [folder for folder in folders if (folder / HELD_OUT_DIR / MANIFEST_FILE).exists()]
    index = build_index(having, HELD_OUT_DIR, encoder) if having else None
    return index if index is not None and len(index) else None
