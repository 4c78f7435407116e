"""A model as a Hugging Face folder that transformers loads without any code of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.model.presets import Preset
from sailvl_trainer.model.processor import write_processor


def export_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, preset: Preset, path: Path
) -> None:
    """Written beside its place and renamed, so that a folder of this name is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    write_processor(preset, temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
