"""The interface between the training loop and a training engine, which distributes the optimizer over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from sailvl_trainer.contract import EngineConfig, TrainConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.distributed import all_gather_object

STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
"""Tensors that are saved for each trainable parameter: the float32 weight and AdamW's two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """The contiguous slice of one flattened parameter that this rank owns; the same format for every engine."""

    name: str
    """Parameter name."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """Offset of the slice in the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """One writable 1-D float32 view for each of STATE_KEYS."""

    @property
    def numel(self) -> int:
        """Number of elements in the slice."""
        return self.tensors["weight"].numel()


class Engine(Protocol):
    """One optimizer step is one `backward` per microbatch, then `step`. Every rank makes the same calls."""

    @property
    def module(self) -> nn.Module:
        """The module to call for the forward pass; its parameter names are the names in checkpoints."""

    def backward(self, loss_sum: torch.Tensor, loss_tokens: int) -> None:
        """Accumulate a microbatch's gradient; `loss_tokens` counts the whole step's targets over all ranks."""

    def step(self, learning_rate: float) -> float:
        """Reduce and clip the gradients, update the weights, zero the gradients; return the norm before clipping."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield the slices of trainable parameters and optimizer states that this rank owns, to read or to write."""

    def sync_after_load(self, step: int) -> None:
        """Make the engine consistent after its fragments were overwritten: `step` updates done, forward weights new."""


def build_engine(module: nn.Module, engine: EngineConfig, config: TrainConfig, *, device: torch.device) -> Engine:
    """Return the configured engine around a module on its device. Raises ConfigError for an unsupported one."""
    if engine.name != "deepspeed":
        raise ConfigError(f"engine.name is {engine.name}, which is not supported yet; set deepspeed")
    if engine.zero_stage != 1:
        raise ConfigError(f"engine.zeroStage is {engine.zero_stage}; set 1, other stages are not supported yet")
    from sailvl_trainer.train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, engine, config, device=device)


def check_frozen(engine: Engine, trainable_names: Collection[str]) -> None:
    """Assert that frozen parameters have no gradient and no optimizer state. COLLECTIVE; called after the first step.

    `trainable_names` are parameter names of the wrapped model, as `set_trainable` returns them.
    """
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    with_gradient = [name for name, parameter in frozen.items() if parameter.grad is not None]
    assert not with_gradient, f"frozen parameters have a gradient: {with_gradient[:3]}"
    with_state = set[str]().union(*all_gather_object({f.name.removeprefix("model.") for f in engine.fragments()}))
    wrong = sorted(with_state ^ set(trainable_names))
    assert not wrong, f"frozen parameters have optimizer state, or trainable ones have none: {wrong[:3]}"
