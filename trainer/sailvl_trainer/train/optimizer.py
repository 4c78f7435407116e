"""The optimizer and its learning rate: AdamW over the trainable parameters; linear warm-up, then a cosine.

Called by the engine and by the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from sailvl_trainer.contract import TrainConfig

BETAS = (0.9, 0.95)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on vectors such as norms, biases and scales."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=BETAS)


def build_schedule(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Return the function from a step's number, counted from 0, to its learning rate."""
    warmup_steps = max(1, math.ceil(config.warmup_ratio * steps))
    floor = config.min_learning_rate_ratio

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return config.learning_rate * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return learning_rate
