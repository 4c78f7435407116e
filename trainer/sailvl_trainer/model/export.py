"""A model as a Hugging Face folder that transformers loads without any code of ours."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.model.presets import Preset
from sailvl_trainer.model.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

PREPROCESSOR_FILE = "preprocessor_config.json"


def export_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, preset: Preset, path: Path
) -> None:
    """Written beside its place and renamed, so that a folder of this name is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    (temporary / PREPROCESSOR_FILE).write_text(json.dumps(_preprocessor(preset), indent=2))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def _preprocessor(preset: Preset) -> dict[str, object]:
    """What an inference server needs to cut pictures as training did."""
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": preset.image_size, "width": preset.image_size},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "crop_to_patches": True,
        "max_patches": 12,
        "image_span": [IMAGE_START, IMAGE_CONTEXT, IMAGE_END],
    }
