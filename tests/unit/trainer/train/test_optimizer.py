"""Learning-rate schedule, optimizer groups and choice of engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sailvl_trainer.contract import EngineConfig
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.train.engine import build_engine
from sailvl_trainer.train.optimizer import build_optimizer, build_schedule
from tests.support.builders.training import build_stage

RATES = [
    pytest.param(0.1, 0.0, 100, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}, id="warm-up, then a cosine to 0"),
    pytest.param(0.1, 0.2, 100, {9: 1.0, 55: 0.6, 100: 0.2, 200: 0.2}, id="minimum learning rate"),
    pytest.param(0.0, 0.0, 4, {0: 1.0, 1: 1.0}, id="at least one warm-up step"),
    pytest.param(0.5, 0.0, 1, {0: 1.0}, id="single step"),
]


@pytest.mark.parametrize(("warmup", "floor", "steps", "expected"), RATES)
def test_schedule_warms_up_linearly_then_follows_a_cosine(
    warmup: float, floor: float, steps: int, expected: dict[int, float], tmp_path: Path
) -> None:
    stage = build_stage(tmp_path, learning_rate=2.0, warmup_ratio=warmup, min_learning_rate_ratio=floor)
    assert stage.train is not None
    rate = build_schedule(stage.train, steps)
    assert {step: rate(step) / 2 for step in expected} == pytest.approx(expected, abs=1e-9)


def test_optimizer_decays_trainable_matrices_only(tmp_path: Path) -> None:
    config = build_stage(tmp_path, weight_decay=0.1).train
    assert config is not None
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 3))
    module[2].requires_grad_(False)
    groups = build_optimizer(module, config).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


UNBUILT = [
    pytest.param(EngineConfig(name="fsdp2"), "engine.name is fsdp2.*set deepspeed", id="fsdp2"),
    pytest.param(EngineConfig(zero_stage=3), "engine.zeroStage is 3; set 1", id="ZeRO-3"),
]


@pytest.mark.parametrize(("engine", "message"), UNBUILT)
def test_unsupported_engine_raises_config_error(engine: EngineConfig, message: str, tmp_path: Path) -> None:
    config = build_stage(tmp_path).train
    assert config is not None
    with pytest.raises(ConfigError, match=message):
        build_engine(torch.nn.Linear(1, 1), engine, config, device=torch.device("cpu"))
