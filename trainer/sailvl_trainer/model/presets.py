"""The architectures that a run can train, each a function that returns a whole configuration.

Sizes: SAIL-VL (arXiv 2501.05952) and the model cards of InternViT-300M-448px and Qwen2.5. A 2x2 pixel shuffle merges
four patches into one image token of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sailvl_trainer.errors import ConfigError

DOWNSAMPLE = 0.5
"""Pixel shuffle: the side of the patch grid is halved."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels by channel, by which every preset's images are normalised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """An architecture, without the vocabulary, which comes from the tokenizer."""

    name: str
    image_size: int
    """Side length of a tile in pixels."""
    patch_size: int
    vision: dict[str, Any]
    """Arguments of transformers' configuration class for `vision_type`."""
    vision_type: str = "internvl_vision"
    """internvl_vision (InternViT: a class token, which is dropped) or aimv2_vision_model (patches alone)."""
    text_type: str
    """qwen2 or qwen3."""
    text: dict[str, Any]
    """Arguments of transformers' configuration class for `text_type`; vocab_size defaults to the tokenizer's."""

    @property
    def tokens_per_tile(self) -> int:
        """Number of image tokens that one tile fills in the language model."""
        return int((self.image_size // self.patch_size * DOWNSAMPLE) ** 2)


def get_preset(name: str) -> Preset:
    """Return a preset by name. Raises ConfigError that lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset is {name!r}; set one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def tiny() -> Preset:
    """Return a preset of the same shape as the large ones that trains in seconds on a CPU.

    Weights are initialised with a deviation of 1/sqrt(width). With the 0.02 of wide models, a narrow one hardly learns
    to retrieve tokens from its context: the tiny language model reached a loss of 0.35 in 320 steps, and 0.001 in 200
    steps with this initialisation.
    """
    return Preset(
        name="tiny",
        image_size=112,
        patch_size=14,
        vision=_vision(hidden=96, layers=3, heads=4, intermediate=384, image_size=112) | {"initializer_range": 0.1},
        text_type="qwen2",
        text=_text(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, tied=True)
        | {"rope_theta": 10_000.0, "initializer_range": 0.08},
    )


def sail_vl_2b() -> Preset:
    """Return the preset of InternViT-300M-448px and Qwen2.5-1.5B."""
    text = _text(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, tied=True, vocabulary=151_936)
    return _sail_vl("sail-vl-2b", text)


def sail_vl_8b() -> Preset:
    """Return the preset of InternViT-300M-448px and Qwen2.5-7B."""
    text = _text(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18_944, tied=False, vocabulary=152_064)
    return _sail_vl("sail-vl-8b", text)


def sail_vl2_2b() -> Preset:
    """Return the preset of SAILViT-Huge, which has the shape of AIMv2-Huge, and Qwen3-1.7B (arXiv 2509.14033)."""
    text = _text(hidden=2048, layers=28, heads=16, kv_heads=8, intermediate=6144, tied=True, vocabulary=151_936)
    return Preset(
        name="sail-vl2-2b",
        image_size=448,
        patch_size=14,
        vision_type="aimv2_vision_model",
        vision={
            "hidden_size": 1536,
            "num_hidden_layers": 24,
            "num_attention_heads": 12,
            "intermediate_size": 4096,
            "image_size": 448,
            "patch_size": 14,
            "use_head": False,
            "is_native": False,
        },
        text_type="qwen3",
        text=text | {"head_dim": 128},
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "tiny": tiny,
    "sail-vl-2b": sail_vl_2b,
    "sail-vl-8b": sail_vl_8b,
    "sail-vl2-2b": sail_vl2_2b,
}


def _sail_vl(name: str, text: dict[str, Any]) -> Preset:
    vision = _vision(hidden=1024, layers=24, heads=16, intermediate=4096, image_size=448)
    return Preset(name=name, image_size=448, patch_size=14, vision=vision, text_type="qwen2", text=text)


def _vision(*, hidden: int, layers: int, heads: int, intermediate: int, image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "image_size": [image_size, image_size],
        "patch_size": [14, 14],
        "attention_bias": True,
        "use_qk_norm": False,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.1,
        "norm_type": "layer_norm",
    }


def _text(
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool, vocabulary: int | None = None
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
    }
    return text if vocabulary is None else text | {"vocab_size": vocabulary}
