"""How much arithmetic a step takes, and how much the machine could do: their ratio is the model FLOPs utilisation.

Counted as in PaLM's appendix B (arXiv 2204.02311): matrix products only, attention over all pairs of a sample's
positions, padding and recomputation not at all. Called by the loop.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from sailvl_trainer.contract import Part
from sailvl_trainer.data.collate import Batch
from sailvl_trainer.model.freeze import select_part
from sailvl_trainer.model.presets import Preset

ORDER: tuple[Part, ...] = ("vision", "connector", "language")
"""As activations flow."""
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 operations a second by part of the device's name, from the makers' data sheets; longer names first."""
PROBE_WIDTH = 1024
PROBE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """Operations of the model's parts."""

    passes: dict[Part, int]
    """How often a part's products are computed: forward, for its weights, for what comes before it."""
    vision_tile: float
    """Forward of a tile."""
    connector_tile: float
    language_token: float
    """Forward of a position, without attention and output head."""
    attention_pair: float
    """Forward of a pair of positions in all layers of the language model."""
    head_label: float
    """Forward of a position with loss in the output head."""

    def count(self, batches: Iterable[Batch]) -> float:
        """Floating-point operations of one rank's microbatches, forward and backward."""
        total = 0.0
        for batch in batches:
            total += self.passes["vision"] * self.vision_tile * batch.tiles
            total += self.passes["connector"] * self.connector_tile * batch.tiles
            language = self.language_token * batch.tokens + self.head_label * batch.labels
            total += self.passes["language"] * language + self._attention_passes * self.attention_pair * batch.pairs
        return total

    @property
    def _attention_passes(self) -> int:
        """Both factors of its products are activations, so a gradient through it takes two, whoever learns."""
        return 1 if self.passes["language"] == 1 else 3


def build_arithmetic(model: InternVLForConditionalGeneration, preset: Preset, learning: Collection[Part]) -> Arithmetic:
    """The counts of a model of which these parts learn."""
    vision, text = model.config.vision_config, model.config.text_config
    patches = (preset.image_size // preset.patch_size) ** 2 + 1
    attention = 4 * patches * patches * vision.hidden_size * vision.num_hidden_layers
    vision_weights, connector_weights, language_weights = (_count_weights(model, part) for part in ORDER)
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return Arithmetic(
        passes={part: _count_passes(part, learning) for part in ORDER},
        vision_tile=2.0 * vision_weights * patches + attention,
        connector_tile=2.0 * connector_weights * preset.tokens_per_tile,
        language_token=2.0 * language_weights,
        attention_pair=4.0 * heads * text.num_hidden_layers,
        head_label=2.0 * text.vocab_size * text.hidden_size,
    )


def find_peak(device: torch.device, *, is_bf16: bool) -> float:
    """Operations a second that the device can do: its data sheet's, else those of a large product measured here."""
    if device.type == "cuda" and is_bf16:
        name = torch.cuda.get_device_name(device)
        for part in sorted(PEAKS, key=len, reverse=True):
            if part in name:
                return PEAKS[part]
    return measure_peak(device, torch.bfloat16 if is_bf16 else torch.float32)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of the products of two square matrices, of those that a fifth of a second has room for."""
    a_KK = torch.ones(PROBE_WIDTH, PROBE_WIDTH, device=device, dtype=dtype)
    fastest, until = float("inf"), time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        start = time.perf_counter()
        product_KK = a_KK @ a_KK
        float(product_KK[0, 0])  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * PROBE_WIDTH**3 / fastest


def _count_weights(model: InternVLForConditionalGeneration, part: Part) -> int:
    """Of matrix products, once each; the output head is counted by labels, the patches' convolution as a product."""
    module = select_part(model, part)[0]
    kinds = (nn.Linear, nn.Conv2d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))


def _count_passes(part: Part, learning: Collection[Part]) -> int:
    """Forward; for its own weights if it learns; for its inputs if it or something before it learns.

    The gradient for the inputs of the first layer that learns isn't needed, and is counted: it is one of many.
    """
    if not set(ORDER[: ORDER.index(part) + 1]) & set(learning):
        return 1
    return 3 if part in learning else 2
