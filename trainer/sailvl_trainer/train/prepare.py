"""What a training stage needs before its first step: tokenizer, model, index, planner and the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.contract import EXPORT_DIR, HELD_OUT_DIR, SHARDS_DIR, TrainConfig
from sailvl_trainer.data.index import Encoder, Index, build_index
from sailvl_trainer.data.planner import Planner, build_planner
from sailvl_trainer.model.build import build_model
from sailvl_trainer.model.freeze import set_trainable
from sailvl_trainer.model.presets import Preset, preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    preset: Preset
    tokenizer: PreTrainedTokenizerFast
    model: InternVLForConditionalGeneration
    learning: list[str]
    """Names of the parameters that learn."""
    encoder: Encoder
    index: Index
    held_out: Index
    planner: Planner


def prepare(context: Context, config: TrainConfig) -> Prepared:
    """The same on every rank. Raises ConfigError or DataError for what can't be trained on."""
    stage = context.stage
    init_from = None if stage.init_from is None else Path(stage.init_from) / EXPORT_DIR
    tokenizer, preset_ = load_tokenizer(stage.model, init_from), preset(stage.model.preset)
    model = build_model(stage.model, tokenizer, init_from=init_from, seed=stage.seed)
    encoder = Encoder(tokenizer=tokenizer, preset=preset_, max_tiles=config.max_tiles, pack_tokens=config.pack_tokens)
    folders = [Path(path) for path in config.data]
    index = build_index(folders, SHARDS_DIR, encoder)
    return Prepared(
        preset=preset_,
        tokenizer=tokenizer,
        model=model,
        learning=set_trainable(model, config.train),
        encoder=encoder,
        index=index,
        held_out=build_index(folders, HELD_OUT_DIR, encoder),
        planner=build_planner(
            index,
            pack_tokens=config.pack_tokens,
            pack_tiles=config.pack_tiles,
            packs_per_step=max(1, round(config.batch_tokens / config.pack_tokens)),
        ),
    )


def count_steps(config: TrainConfig, planner: Planner, seed: int) -> int:
    """Optimizer steps of the budget."""
    steps, tokens = planner.count_steps(seed)
    if (config.tokens is None) == (config.epochs is None):
        raise ConfigError("give exactly one of tokens and epochs")
    epochs = config.epochs if config.epochs is not None else (config.tokens or 0) / tokens
    return max(1, math.ceil(steps * epochs))
