"""AdamW over the trainable parameters; called by the engines."""

from __future__ import annotations

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
