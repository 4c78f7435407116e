"""The learning-rate schedule of a stage: linear warm-up, then a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from sailvl_trainer.contract import TrainConfig


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
