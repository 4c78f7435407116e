"""A preset's model: transformers' InternVL, from random weights, pretrained parts, or an earlier stage's export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.presets import DOWNSAMPLE, Preset, preset
from sailvl_trainer.model.tokenizer import END_OF_TEXT, IM_END, IMAGE_CONTEXT


def build_config(preset_: Preset, tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    """The configuration of a preset with a tokenizer's vocabulary."""
    vocabulary = max(preset_.text.get("vocab_size", 0), len(tokenizer))
    text = AutoConfig.for_model(preset_.text_type, **(_text_arguments(preset_) | {"vocab_size": vocabulary}))
    text.eos_token_id = tokenizer.convert_tokens_to_ids(IM_END)
    text.pad_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return InternVLConfig(
        vision_config=AutoConfig.for_model(preset_.vision_type, **preset_.vision),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=preset_.tokens_per_tile,
        downsample_ratio=DOWNSAMPLE,
        vision_feature_select_strategy="default" if preset_.vision_type == "internvl_vision" else "full",
        tie_word_embeddings=preset_.text["tie_word_embeddings"],
    )


def build_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, init_from: Path | None = None, seed: int = 0
) -> InternVLForConditionalGeneration:
    """In float32 on the CPU, the same on every rank. Raises ConfigError for weights that don't fit the preset."""
    if init_from is not None:
        return straighten(_load(InternVLForConditionalGeneration, init_from))
    torch.manual_seed(seed)
    built = InternVLForConditionalGeneration(build_config(preset(model.preset), tokenizer)).float()
    if model.vision is not None:
        _fill(built.model.vision_tower, AutoModel, Path(model.vision), "model.vision")
    if model.language is not None:
        source = _load(AutoModelForCausalLM, Path(model.language))
        source.resize_token_embeddings(built.config.text_config.vocab_size)
        _copy(built.model.language_model, source.model, "model.language")
        _copy(built.lm_head, source.lm_head, "model.language")
    return straighten(built)


def straighten(model: InternVLForConditionalGeneration) -> InternVLForConditionalGeneration:
    """AIMv2 gives features in a memory order that transformers' pixel shuffle can't view; others are left alone."""

    def make_contiguous(_: torch.nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.contiguous()
        return output

    model.model.vision_tower.register_forward_hook(make_contiguous)
    return model


def count_parameters(model: torch.nn.Module) -> int:
    """Distinct parameters: tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def _text_arguments(preset_: Preset) -> dict[str, object]:
    arguments = dict(preset_.text)
    theta = arguments.pop("rope_theta")
    return arguments | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _load(kind: Any, path: Path) -> Any:
    try:
        return kind.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model can be loaded from {path}: {error}") from error


def _fill(target: torch.nn.Module, kind: Any, path: Path, field: str) -> None:
    _copy(target, _load(kind, path), field)


def _copy(target: torch.nn.Module, source: torch.nn.Module, field: str) -> None:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"{field} does not fit the preset: {error}") from error
