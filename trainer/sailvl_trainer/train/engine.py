"""The training engine, which distributes the optimizer over the ranks: the training loop's interface, and DeepSpeed.

DeepSpeed's ZeRO-1 keeps whole weights on every rank, and shards optimizer states and float32 weights over the ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from sailvl_trainer.contract import EngineConfig, TrainConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.collectives import all_gather_values
from sailvl_trainer.train.optimizer import build_optimizer

logger = logging.getLogger(__name__)

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


class DeepSpeedEngine:
    """Implements `Engine` with DeepSpeed ZeRO-1.

    DeepSpeed averages gradients over the ranks, so losses are scaled by the world size to obtain their sum.
    """

    def __init__(self, module: nn.Module, engine: EngineConfig, config: TrainConfig, *, device: torch.device) -> None:
        import deepspeed

        # Mark all DeepSpeed kernels as unavailable: none is used, and on the CPU it would compile an inference kernel.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.module = module
        self._world_size = dist.get_world_size()
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, config),
                config=_build_deepspeed_config(engine, config, device),
                dist_init_required=False,
            )
        self._set_optimizer_step(0)

    def backward(self, loss_sum: torch.Tensor, loss_tokens: int) -> None:
        """Accumulate a microbatch's gradient; `loss_tokens` counts the whole step's targets over all ranks."""
        self._engine.backward(loss_sum * (self._world_size / max(1, loss_tokens)))

    def step(self, learning_rate: float) -> float:
        """Reduce and clip the gradients, update the weights; return the gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def fragments(self) -> Iterator[Fragment]:
        """Yield views into the flat buffers of ZeRO's parameter groups."""
        zero = self._engine.optimizer
        for name, parameter in self.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if not parameter.requires_grad or mapping is None:
                continue
            state = zero.optimizer.state[zero.single_partition_of_fp32_groups[mapping.param_group_index]]
            address = mapping.hp_fragment_address
            yield Fragment(
                name=name,
                shape=tuple(parameter.shape),
                start=mapping.lp_fragment_address.start,
                tensors={
                    "weight": mapping.hp_fragment.detach(),
                    "exp_avg": state["exp_avg"].narrow(0, address.start, address.numel),
                    "exp_avg_sq": state["exp_avg_sq"].narrow(0, address.start, address.numel),
                },
            )

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count, and gather the forward weights from the float32 shards."""
        self._set_optimizer_step(step)
        self._engine.optimizer.update_lp_params()

    def _set_optimizer_step(self, step: int) -> None:
        """Set the step count and create AdamW's moments, which it would create only at its first step."""
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            state = zero.optimizer.state[flat]
            for key in ("exp_avg", "exp_avg_sq"):
                state.setdefault(key, torch.zeros_like(flat))
            state["step"] = torch.tensor(float(step))


def build_engine(module: nn.Module, engine: EngineConfig, config: TrainConfig, *, device: torch.device) -> Engine:
    """Return the configured engine around a module on its device. Raises ConfigError for an unsupported one."""
    if engine.name != "deepspeed":
        raise ConfigError(f"engine.name is {engine.name}, which is not supported yet; set deepspeed")
    if engine.zero_stage != 1:
        raise ConfigError(f"engine.zeroStage is {engine.zero_stage}; set 1, other stages are not supported yet")
    return DeepSpeedEngine(module, engine, config, device=device)


def check_frozen(engine: Engine, trainable_names: Collection[str]) -> None:
    """Assert that frozen parameters have no gradient and no optimizer state. COLLECTIVE; called after the first step.

    `trainable_names` are parameter names of the wrapped model, as `set_trainable` returns them.
    """
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    with_gradient = [name for name, parameter in frozen.items() if parameter.grad is not None]
    assert not with_gradient, f"frozen parameters have a gradient: {with_gradient[:3]}"
    own = {fragment.name.removeprefix("model.") for fragment in engine.fragments()}
    with_state = set[str]().union(*all_gather_values(set[str], own))
    wrong = sorted(with_state ^ set(trainable_names))
    assert not wrong, f"frozen parameters have optimizer state, or trainable ones have none: {wrong[:3]}"


def _build_deepspeed_config(engine: EngineConfig, config: TrainConfig, device: torch.device) -> dict[str, object]:
    is_bf16 = config.precision == "bf16" and device.type != "cpu"
    if config.precision == "bf16" and not is_bf16:
        logger.warning("precision bf16 needs an accelerator; training in float32 on this CPU")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
        "steps_per_print": 10**9,
    }
