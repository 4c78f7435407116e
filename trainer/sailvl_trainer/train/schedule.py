"""The learning rate over a stage: linear warm-up, then a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from sailvl_trainer.contract import TrainConfig


def build_schedule(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Step number, from 0, to learning rate."""
    warmup = max(1, math.ceil(config.warmup_ratio * steps))
    floor = config.min_learning_rate_ratio

    def rate(step: int) -> float:
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        part = min(1.0, (step - warmup) / max(1, steps - warmup))
        return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))

    return rate
