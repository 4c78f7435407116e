"""The tokenizer of a preset: the bundled one for `tiny`, else that of the pretrained language model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sailvl_trainer.contract import ModelConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.model.folders import translate_model_errors

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)


def load_tokenizer(model: ModelConfig, init_from: Path | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of an export, of the pretrained language model, or of `tiny`. Raises ConfigError."""
    source = str(init_from) if init_from is not None else model.language
    if source is not None:
        with translate_model_errors(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"{source} contains no tokenizer; add the tokenizer's files to the folder")
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
        return tokenizer
    if model.preset != "tiny":
        raise ConfigError(
            f"model.language is not set: preset {model.preset} needs a pretrained language model for its vocabulary; "
            "set a folder on the storage"
        )
    shipped = files("sailvl_trainer.model") / "tokenizer-tiny.json"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shipped),
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
