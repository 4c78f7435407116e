"""DeepSpeed ZeRO-1 behind the three calls that the loop makes, and its state as fragments by parameter name."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import torch
from torch import nn

from sailvl_trainer.contract import EngineConfig, TrainConfig
from sailvl_trainer.runtime.errors import ConfigError
from sailvl_trainer.train.fragments import Fragment


class DeepSpeedEngine:
    """Gradients are summed over microsteps and averaged over ranks; `step` is the boundary."""

    def __init__(self, module: nn.Module, engine: EngineConfig, config: TrainConfig, *, world_size: int) -> None:
        if engine.name != "deepspeed" or engine.zero_stage != 1:
            raise ConfigError(f"engine {engine.name} with zeroStage {engine.zero_stage} is not built yet; use ZeRO-1")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.module = module
        self._world_size = world_size
        learning = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            _groups(learning, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=_settings(engine, config), dist_init_required=False
            )
        self._materialise()

    def backward(self, loss_sum: torch.Tensor, labels: int) -> None:
        """Add a microbatch's gradient; `labels`: positions with loss in the whole step, over all ranks."""
        self._engine.backward(loss_sum * (self._world_size / max(1, labels)))

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update; the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of every learning parameter, as writable float32 views."""
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
        """Fragments were written to: set the optimizer's clock and bring the forward's copies up to date."""
        self._materialise(step)
        self._engine.optimizer.update_lp_params()

    def _materialise(self, step: int = 0) -> None:
        """The optimizer's state, which AdamW makes at its first step only."""
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            state = zero.optimizer.state[flat]
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(flat)
            state["step"] = torch.tensor(float(step))


def _groups(parameters: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; vectors, norms and biases don't."""
    matrices = [p for _, p in parameters if p.ndim > 1]
    vectors = [p for _, p in parameters if p.ndim <= 1]
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _settings(engine: EngineConfig, config: TrainConfig) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    }
