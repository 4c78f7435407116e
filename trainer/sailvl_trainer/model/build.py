"""Builds transformers' InternVL for a preset, and sets which of its parts are trainable.

The weights are random, or those of pretrained parts or of an earlier stage's export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sailvl_trainer.contract import ModelConfig, Part
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.folders import translate_model_errors
from sailvl_trainer.model.presets import DOWNSAMPLE, Preset, get_preset
from sailvl_trainer.model.tokenizer import END_OF_TEXT, IM_END, IMAGE_CONTEXT

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MAX_VOCABULARY = 1 << 20
"""Largest number of tokens of a language model; the largest vocabularies have a quarter of it."""


def build_config(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    """Return the configuration of a preset with a tokenizer's vocabulary."""
    vocabulary = max(preset.text.get("vocab_size", 0), len(tokenizer))
    text = AutoConfig.for_model(preset.text_type, **(_text_arguments(preset) | {"vocab_size": vocabulary}))
    text.eos_token_id = tokenizer.convert_tokens_to_ids(IM_END)
    text.pad_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return InternVLConfig(
        vision_config=AutoConfig.for_model(preset.vision_type, **preset.vision),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=preset.tokens_per_tile,
        downsample_ratio=DOWNSAMPLE,
        vision_feature_select_strategy="default" if preset.vision_type == "internvl_vision" else "full",
        tie_word_embeddings=preset.text["tie_word_embeddings"],
    )


def build_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, init_from: Path | None = None, seed: int = 0
) -> InternVLForConditionalGeneration:
    """Return the model in float32 on the CPU, equal on every rank.

    Raises ConfigError if weights can't be loaded or don't fit the preset.
    """
    config = build_config(get_preset(model.preset), tokenizer)
    if init_from is not None:
        _check_sizes(init_from, "initFrom", {"text_config": config.text_config, "vision_config": config.vision_config})
        return make_features_contiguous(_load_export(init_from))
    torch.manual_seed(seed)
    built = InternVLForConditionalGeneration(config).float()
    if model.vision is not None:
        _check_sizes(Path(model.vision), "model.vision", {"": config.vision_config})
        _fill(built.model.vision_tower, AutoModel, Path(model.vision), "model.vision")
    if model.language is not None:
        _check_sizes(Path(model.language), "model.language", {"": config.text_config})
        source = _load(AutoModelForCausalLM, Path(model.language))
        source.resize_token_embeddings(built.config.text_config.vocab_size)
        _copy(built.model.language_model, source.model, "model.language")
        _copy(built.lm_head, source.lm_head, "model.language")
    return make_features_contiguous(built)


def make_features_contiguous(model: InternVLForConditionalGeneration) -> InternVLForConditionalGeneration:
    """Make the vision features contiguous: AIMv2's memory layout can't be viewed by transformers' pixel shuffle."""

    def make_contiguous(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.contiguous()
        return output

    model.model.vision_tower.register_forward_hook(make_contiguous)
    return model


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def select_part(model: InternVLForConditionalGeneration, part: Part) -> list[nn.Module]:
    """Return the modules of a part; the output head belongs to the language model."""
    return {
        "vision": [model.model.vision_tower],
        "connector": [model.model.multi_modal_projector],
        "language": [model.model.language_model, model.lm_head],
    }[part]


def set_trainable(model: InternVLForConditionalGeneration, parts: tuple[Part, ...]) -> list[str]:
    """Freeze everything but `parts`; return the names of the trainable parameters."""
    model.requires_grad_(False)
    for part in parts:
        for module in select_part(model, part):
            module.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_frozen_to_eval(model: InternVLForConditionalGeneration) -> None:
    """Set frozen parts to evaluation mode: no dropout, no running statistics."""
    for part in get_args(Part):
        for module in select_part(model, part):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()


def _text_arguments(preset: Preset) -> dict[str, object]:
    arguments = dict(preset.text)
    theta = arguments.pop("rope_theta")
    return arguments | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _check_sizes(path: Path, field: str, expected: dict[str, Any]) -> None:
    """Raise ConfigError if the config in a folder has other sizes than the preset, before a model of them is built.

    `expected`: configs of the preset by the name of the part in the folder's config, or by "" for the whole.
    """
    with translate_model_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for part, preset in expected.items():
        own = getattr(config, part, None) if part else config
        for name in SIZES:
            found, size = getattr(own, name, None), getattr(preset, name, None)
            if size is not None and found != size:
                raise ConfigError(f"{field} does not fit the preset: {path} has {name} {found!r:.50}, expected {size}")
        vocabulary = getattr(own, "vocab_size", 0)
        if not isinstance(vocabulary, int) or not 0 <= vocabulary <= MAX_VOCABULARY:
            raise ConfigError(f"{field} does not fit the preset: {path} has a vocabulary of {vocabulary!r:.50} tokens")


def _load_export(path: Path) -> InternVLForConditionalGeneration:
    """Load an export. Raises ConfigError if it lacks a weight, which transformers would fill with random numbers."""
    with translate_model_errors(path):
        model, report = InternVLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(f"cannot load a model from {path}: it lacks {missing}; train the stage that wrote it again")
    return model


def _load(kind: Any, path: Path) -> Any:
    with translate_model_errors(path):
        return kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)


def _fill(target: nn.Module, kind: Any, path: Path, field: str) -> None:
    _copy(target, _load(kind, path), field)


def _copy(target: nn.Module, source: nn.Module, field: str) -> None:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"{field} does not fit the preset: {error}") from error
