"""What the training loop asks of an engine, which spreads the optimizer over the ranks; and which one a stage uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from sailvl_trainer.contract import EngineConfig, TrainConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.train.fragments import Fragment


class Engine(Protocol):
    """One optimizer step is `backward` for every microbatch, then `step`. All ranks make the same calls."""

    @property
    def module(self) -> nn.Module:
        """What the forward is called on; its parameters keep the names of checkpoints."""

    def backward(self, loss_sum: torch.Tensor, labels: int) -> None:
        """Add a microbatch's gradient; `labels`: positions with loss in the whole step, over all ranks."""

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update, forget the gradients; the gradient's norm before clipping."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the parameters that learn, and of their optimizer states, to read or to write."""

    def after_load(self, step: int) -> None:
        """Fragments were written to: set the optimizer's clock, bring the forward's copies up to date."""


def build_engine(module: nn.Module, engine: EngineConfig, config: TrainConfig, *, device: torch.device) -> Engine:
    """The engine that a stage asks for, around a module on its device. Raises ConfigError for one not built yet."""
    if engine.name != "deepspeed":
        raise ConfigError(f"engine.name is {engine.name}, which is not built yet; write deepspeed")
    if engine.zero_stage != 1:
        raise ConfigError(f"engine.zeroStage is {engine.zero_stage}; write 1, the others are not built yet")
    from sailvl_trainer.train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, engine, config, device=device)
