"""DeepSpeed ZeRO-1: whole weights on every rank, optimizer states and float32 weights in equal parts."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from sailvl_trainer.contract import EngineConfig, TrainConfig
from sailvl_trainer.train.fragments import Fragment
from sailvl_trainer.train.optimizer import build_optimizer

logger = logging.getLogger(__name__)


class DeepSpeedEngine:
    """The protocol of `Engine`. DeepSpeed averages gradients over the ranks; losses are scaled to undo that."""

    def __init__(self, module: nn.Module, engine: EngineConfig, config: TrainConfig, *, device: torch.device) -> None:
        import deepspeed

        # All its kernels count as not to be had: none is used, and on the CPU it would compile one of inference's
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.module = module
        self._world_size = dist.get_world_size()
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, config),
                config=_settings(engine, config, device),
                dist_init_required=False,
            )
        self._set_clock(0)

    def backward(self, loss_sum: torch.Tensor, labels: int) -> None:
        """Add a microbatch's gradient."""
        self._engine.backward(loss_sum * (self._world_size / max(1, labels)))

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update; the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def fragments(self) -> Iterator[Fragment]:
        """Views into the flat buffers of ZeRO's groups."""
        zero = self._engine.optimizer
        for name, parameter in self.module.named_parameters():
            owned = getattr(parameter, "_hp_mapping", None)
            if not parameter.requires_grad or owned is None:
                continue
            state = zero.optimizer.state[zero.single_partition_of_fp32_groups[owned.param_group_index]]
            at = owned.hp_fragment_address
            yield Fragment(
                name=name,
                shape=tuple(parameter.shape),
                start=owned.lp_fragment_address.start,
                tensors={
                    "weight": owned.hp_fragment.detach(),
                    "exp_avg": state["exp_avg"].narrow(0, at.start, at.numel),
                    "exp_avg_sq": state["exp_avg_sq"].narrow(0, at.start, at.numel),
                },
            )

    def after_load(self, step: int) -> None:
        """The weights of the forward are gathered from the float32 parts."""
        self._set_clock(step)
        self._engine.optimizer.update_lp_params()

    def _set_clock(self, step: int) -> None:
        """AdamW makes its state at its first step only; a checkpoint is read before it."""
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            state = zero.optimizer.state[flat]
            for key in ("exp_avg", "exp_avg_sq"):
                state.setdefault(key, torch.zeros_like(flat))
            state["step"] = torch.tensor(float(step))


def _settings(engine: EngineConfig, config: TrainConfig, device: torch.device) -> dict[str, object]:
    is_bf16 = config.precision == "bf16" and device.type != "cpu"
    if config.precision == "bf16" and not is_bf16:
        logger.warning("precision bf16 is for accelerators; this CPU trains in float32")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
        "steps_per_print": 10**9,
    }
