"""Exports a model as a Hugging Face folder that transformers loads without code of this project.

It includes the files of transformers' InternVLProcessor, configured to tile images and to format dialogues as training
does. Called at the end of a training stage.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from sailvl_trainer.model.presets import IMAGENET_MEAN, IMAGENET_STD, Preset
from sailvl_trainer.model.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from sailvl_trainer.storage.export_manifest import write_export_manifest
from sailvl_trainer.storage.files import sync_directory, sync_file, translate_storage_errors

MAX_TILES = 12
BICUBIC = 3
"""Pillow's number of bicubic resampling."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' }}}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_CONTEXT}\\n' }}}}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{{{{ '{IM_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
"""ChatML. The processor replaces each image's one IMAGE_CONTEXT by the whole span, with one per image token."""


def export_model(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    preset: Preset,
    path: Path,
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the folder under a temporary name, sync it and rename it, so that a folder at `path` is always complete.

    `check` is called just before the rename; what it raises is raised. Each call uses its own temporary name, so that a
    superseded attempt that is still writing does no harm. Raises StorageError if the volume is full or unavailable.
    """
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with translate_storage_errors(temporary):
            model.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            _write_processor(preset, temporary)
            for file in filter(Path.is_file, temporary.rglob("*")):
                sync_file(file)
            write_export_manifest(temporary)
            sync_directory(temporary)
        check()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    sync_directory(path.parent)


def _write_processor(preset: Preset, folder: Path) -> None:
    """Write the processor's files into a folder that already holds the tokenizer."""
    pixels = {
        "size": {"height": preset.image_size, "width": preset.image_size},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "resample": BICUBIC,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": MAX_TILES}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": preset.tokens_per_tile}
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "GotOcr2ImageProcessor"} | pixels | tiles)
    _write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "InternVLVideoProcessor"} | pixels)
    _write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _set_special_tokens(folder / "tokenizer_config.json")


def _set_special_tokens(path: Path) -> None:
    """Name the special tokens as the processor expects them. The video token occurs in no dialogue."""
    settings = json.loads(path.read_text())
    settings.pop("additional_special_tokens", None)
    settings["processor_class"] = "InternVLProcessor"
    settings["extra_special_tokens"] = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
        "video_token": END_OF_TEXT,
    }
    _write_json(path, settings)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
