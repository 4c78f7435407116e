"""AdamW over the parameters that learn; called by the engines."""

from __future__ import annotations

import torch
from torch import nn

from sailvl_trainer.contract import TrainConfig

BETAS = (0.9, 0.95)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Matrices decay; vectors (norms, biases, scales) don't. What is frozen is not in it."""
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=BETAS)
