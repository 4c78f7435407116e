"""Learning-rate schedule, optimizer groups, step timer, sample log and choice of engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sailvl_trainer.contract import Checkpoint, EngineConfig, Lineage
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.train.engines.base import build_engine
from sailvl_trainer.train.optimizer import build_optimizer
from sailvl_trainer.train.sample_log import (
    SampleLog,
    count_lost_steps,
    read_skipped_samples,
    read_trained_samples,
    sample_log_path,
)
from sailvl_trainer.train.schedule import build_schedule
from sailvl_trainer.train.throughput import StepTimer
from tests.support.builders.training import build_stage

RATES = [
    pytest.param(0.1, 0.0, 100, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}, id="warm-up, then a cosine to 0"),
    pytest.param(0.1, 0.2, 100, {9: 1.0, 55: 0.6, 100: 0.2, 200: 0.2}, id="a floor that it stays on"),
    pytest.param(0.0, 0.0, 4, {0: 1.0, 1: 1.0}, id="at least one step of warm-up"),
    pytest.param(0.5, 0.0, 1, {0: 1.0}, id="a single step"),
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


@pytest.mark.parametrize(("engine", "words"), UNBUILT)
def test_unsupported_engine_raises_config_error(engine: EngineConfig, words: str, tmp_path: Path) -> None:
    config = build_stage(tmp_path).train
    assert config is not None
    with pytest.raises(ConfigError, match=words):
        build_engine(torch.nn.Linear(1, 1), engine, config, device=torch.device("cpu"))


def test_step_timer_reports_phases_and_rates() -> None:
    timer = StepTimer(world_size=2, pack_tokens=100, peak_flops=10.0, _previous_end=10.0)
    with timer.phase("forward"):
        pass
    first = timer.end_step(tokens=300, microbatches=2, flops=8.0, now=12.0)
    second = timer.end_step(tokens=400, microbatches=2, flops=8.0, now=13.0)
    assert first.keys() == {"forward_seconds", "tokens_per_second", "pack_fill", "mfu"}
    assert (first["tokens_per_second"], first["pack_fill"]) == (150.0, 0.75)
    assert second == {"tokens_per_second": 400.0, "pack_fill": 1.0, "mfu": 0.4}
    assert timer.mean_step_seconds == pytest.approx(1.9)


def test_sample_log_follows_the_lineage_of_attempts(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    starts = {1: None, 2: Checkpoint(step=2, path="checkpoints/attempt-0001/step-00000002")}
    for attempt, start in starts.items():
        write_atomic(files.attempts / f"{attempt}.json", encode(Lineage(attempt=attempt, start=start)))
    first = SampleLog(files, 1)
    for step in (1, 2, 3):
        first.write(step, (step, 10 + step))
    with sample_log_path(files, 1).open("a") as torn:
        torn.write('{"step": 4, "sam')
    SampleLog(files, 1).write(3, (30,))
    assert read_trained_samples(files, last_attempt=1) == {1: [1, 11], 2: [2, 12], 3: [30]}
    assert count_lost_steps(files, 2, start=2) == 2, "step 3, twice"
    second = SampleLog(files, 2)
    second.write(3, (99,), is_skipped=True)
    second.write(4, (98,))
    assert read_trained_samples(files, last_attempt=2) == {1: [1, 11], 2: [2, 12], 4: [98]}
    assert read_skipped_samples(files, last_attempt=2) == {3: [99]}
    assert count_lost_steps(files, 3, start=4) == 2
    assert count_lost_steps(files, 3, start=0) == 6
    claim_stage(files, 3)
    assert read_trained_samples(files, last_attempt=3).keys() == {1, 2, 4}, (
        "an attempt that never began takes nothing back"
    )
