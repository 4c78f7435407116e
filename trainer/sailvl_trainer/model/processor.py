"""Configures transformers' InternVLProcessor to tile images and format dialogues as training does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sailvl_trainer.model.presets import IMAGENET_MEAN, IMAGENET_STD, Preset
from sailvl_trainer.model.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START

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


def write_processor(preset: Preset, folder: Path) -> None:
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
    _write(folder / "preprocessor_config.json", {"image_processor_type": "GotOcr2ImageProcessor"} | pixels | tiles)
    _write(folder / "video_preprocessor_config.json", {"video_processor_type": "InternVLVideoProcessor"} | pixels)
    _write(folder / "processor_config.json", processor)
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
    _write(path, settings)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
