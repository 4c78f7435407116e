"""Throughput of a step: how its wall-clock time divides into phases, and its model FLOPs utilization (MFU).

The MFU is the ratio of the step's model FLOP/s to the devices' peak FLOP/s. FLOPs are counted as in PaLM's appendix B
(arXiv 2204.02311): matrix multiplications only; attention over all pairs of tokens of a sample; neither padding nor
recomputation. Called by the trainer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from sailvl_trainer.contract import Part
from sailvl_trainer.data.collate import Batch
from sailvl_trainer.model.build import select_part
from sailvl_trainer.model.presets import Preset

ORDER: tuple[Part, ...] = ("vision", "connector", "language")
"""The model's parts in the order of the forward pass."""
PEAK_FLOPS = {
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
"""Dense bf16 FLOP/s by a part of the device's name, from the vendors' data sheets; the longest match counts."""
PROBE_WIDTH = 1024
"""Width of the square matrices that measure an unknown device."""
PROBE_SECONDS = 0.2
SMOOTHING = 0.1
"""EMA weight of the newest step time; the mean is used for the ETA."""


@dataclass(kw_only=True, slots=True)
class StepTimer:
    """Measures the steps of one rank."""

    world_size: int
    pack_tokens: int
    """Capacity of one pack, in tokens."""
    peak_flops: float = 0.0
    """Peak FLOP/s of one rank's device; 0 if unknown, and no MFU is reported then."""
    mean_step_seconds: float = 0.0
    """Exponential moving average of the wall-clock time per step, including data waits and checkpoints."""
    _phase_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _previous_end: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add a block's duration to a phase of the current step: data, forward, backward, step or checkpoint."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phase_seconds[name] += time.monotonic() - start

    def end_step(self, *, tokens: int, microbatches: int, flops: float, now: float) -> dict[str, float]:
        """Return the metrics of the step that has just ended; `tokens` and `flops` count all ranks.

        A checkpoint is saved after its step has ended, so its time counts towards the next step.
        """
        seconds, self._previous_end = max(1e-9, now - self._previous_end), now
        weight = SMOOTHING if self.mean_step_seconds else 1.0
        self.mean_step_seconds += weight * (seconds - self.mean_step_seconds)
        phases = {f"{name}_seconds": spent for name, spent in self._phase_seconds.items()}
        self._phase_seconds.clear()
        capacity = self.pack_tokens * self.world_size * max(1, microbatches)
        mfu = {"mfu": flops / seconds / (self.peak_flops * self.world_size)} if self.peak_flops else {}
        return phases | mfu | {"tokens_per_second": tokens / seconds, "pack_fill": tokens / capacity}


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsCounter:
    """Floating-point operations of the model's parts, by what they are proportional to."""

    passes: dict[Part, int]
    """How often a part's products are computed: forward, for its weights' gradient, for its inputs' gradient."""
    vision_tile: float
    """Forward FLOPs of the vision tower per tile."""
    connector_tile: float
    """Forward FLOPs of the connector per tile."""
    language_token: float
    """Forward FLOPs of the language model per token, without attention and output head."""
    attention_pair: float
    """Forward FLOPs per pair of tokens in all attention layers of the language model."""
    head_loss_token: float
    """Forward FLOPs of the output head per loss token."""

    def count(self, batches: Iterable[Batch]) -> float:
        """Return the forward and backward FLOPs of one rank's microbatches."""
        total = 0.0
        for batch in batches:
            total += self.passes["vision"] * self.vision_tile * batch.tiles
            total += self.passes["connector"] * self.connector_tile * batch.tiles
            language = self.language_token * batch.tokens + self.head_loss_token * batch.loss_tokens
            total += self.passes["language"] * language
            total += self._attention_passes * self.attention_pair * batch.attention_pairs
        return total

    @property
    def _attention_passes(self) -> int:
        """Attention multiplies two activations, so its backward pass costs two products even with frozen weights."""
        return 1 if self.passes["language"] == 1 else 3


def build_flops_counter(
    model: InternVLForConditionalGeneration, preset: Preset, trainable_parts: Collection[Part]
) -> FlopsCounter:
    """Return the counter for a model of which only `trainable_parts` have gradients."""
    vision, text = model.config.vision_config, model.config.text_config
    patches = (preset.image_size // preset.patch_size) ** 2 + 1
    attention = 4 * patches * patches * vision.hidden_size * vision.num_hidden_layers
    vision_weights, connector_weights, language_weights = (_count_weights(model, part) for part in ORDER)
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return FlopsCounter(
        passes={part: _count_passes(part, trainable_parts) for part in ORDER},
        vision_tile=2.0 * vision_weights * patches + attention,
        connector_tile=2.0 * connector_weights * preset.tokens_per_tile,
        language_token=2.0 * language_weights,
        attention_pair=4.0 * heads * text.num_hidden_layers,
        head_loss_token=2.0 * text.vocab_size * text.hidden_size,
    )


def get_peak_flops(device: torch.device, *, is_bf16: bool) -> float:
    """Return the device's peak FLOP/s from its data sheet; an unknown device is measured."""
    if device.type == "cuda" and is_bf16:
        name = torch.cuda.get_device_name(device)
        for part in sorted(PEAK_FLOPS, key=len, reverse=True):
            if part in name:
                return PEAK_FLOPS[part]
    return measure_peak_flops(device, torch.bfloat16 if is_bf16 else torch.float32)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest square matrix product within PROBE_SECONDS."""
    a_KK = torch.ones(PROBE_WIDTH, PROBE_WIDTH, device=device, dtype=dtype)
    fastest, until = float("inf"), time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        start = time.perf_counter()
        product_KK = a_KK @ a_KK
        float(product_KK[0, 0])  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * PROBE_WIDTH**3 / fastest


def _count_weights(model: InternVLForConditionalGeneration, part: Part) -> int:
    """Return the number of weights in a part's products.

    The patch embedding's convolution counts as a product; the output head is counted by its loss tokens instead.
    """
    module = select_part(model, part)[0]
    kinds = (nn.Linear, nn.Conv2d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))


def _count_passes(part: Part, trainable_parts: Collection[Part]) -> int:
    """Return 1 for the forward pass, plus 1 for each gradient: of the part's weights, and of its inputs.

    The input gradient is needed if the part or one before it is trainable. The first trainable layer needs none, which
    is ignored here: it is one layer of many.
    """
    if not set(ORDER[: ORDER.index(part) + 1]) & set(trainable_parts):
        return 1
    return 3 if part in trainable_parts else 2
