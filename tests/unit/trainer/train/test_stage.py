"""A whole training stage in this process: its result, its export, stop and resume."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sailvl_trainer.contract import Result, Stage
from sailvl_trainer.errors import ConfigError, NonFiniteError, Preempted
from sailvl_trainer.rank.context import build_single_process_context
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train import trainer
from sailvl_trainer.train.engine import DeepSpeedEngine
from sailvl_trainer.train.sample_log import read_trained_samples
from sailvl_trainer.train.stage import run
from tests.support.builders.training import SAMPLES, build_set, build_stage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    build_set(root / "set")
    return root


def run_stage(stage: Stage) -> Result:
    return run(build_single_process_context(stage, scratch=Path(stage.output) / "scratch"))


@pytest.fixture(scope="module")
def whole(root: Path) -> Result:
    """The result of a stage that was never interrupted."""
    return run_stage(build_stage(root, run="whole"))


def weights(root: Path, name: str) -> bytes:
    return (StageFiles(build_stage(root, run=name)).export / "model.safetensors").read_bytes()


def interrupt(stage: Stage, step: int, monkeypatch: pytest.MonkeyPatch) -> Preempted:
    """Run the stage, request a stop during a step, and return the error."""
    context = build_single_process_context(stage, scratch=Path(stage.output) / f"scratch-{stage.attempt}")
    advance = trainer.Trainer._record_step

    def advance_and_ask(self: trainer.Trainer, *args: Any) -> None:
        advance(self, *args)
        if self.state.step == step:
            (Path(stage.output) / f"scratch-{stage.attempt}" / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_record_step", advance_and_ask)
        with pytest.raises(Preempted) as stopped:
            run(context)
    return stopped.value


def test_stage_lowers_and_reports_the_validation_loss(root: Path, whole: Result) -> None:
    losses = {"loss", "heldOutLossBefore", "heldOutLoss", "heldOutLossShuffled"}
    assert whole.metrics.keys() == losses | {"skippedSamples"}
    assert whole.metrics["skippedSamples"] == 0
    assert whole.metrics["heldOutLoss"] < whole.metrics["heldOutLossBefore"] - 0.5
    assert whole.samples == 2 * SAMPLES
    trained = read_trained_samples(StageFiles(build_stage(root, run="whole")), last_attempt=1)
    assert Counter(s for samples in trained.values() for s in samples) == dict.fromkeys(range(SAMPLES), 2)
    assert sorted(trained) == list(range(1, whole.steps + 1))


def test_stage_that_measures_no_held_out_samples_reports_no_held_out_loss(root: Path) -> None:
    stage = build_stage(root, run="unmeasured", epochs=0.1, held_out_samples=0)
    assert run_stage(stage).metrics.keys() == {"loss", "skippedSamples"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [pytest.param(2, id="between checkpoints"), pytest.param(-1, id="after the last step")],
)
def test_stop_saves_a_checkpoint_and_the_resume_is_bit_identical(
    stop: int, root: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = stop if stop > 0 else whole.steps
    stage = build_stage(root, run=f"stopped-{step}")
    stopped = interrupt(stage, step, monkeypatch)
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.step == step
    resumed = run_stage(replace(stage, attempt=2))
    assert resumed.metrics == whole.metrics
    assert weights(root, stage.run) == weights(root, "whole")
    used = Counter(s for samples in read_trained_samples(StageFiles(stage), last_attempt=2).values() for s in samples)
    assert used == dict.fromkeys(range(SAMPLES), 2)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [{6}, {3, 6}], ids=["the newest", "all"])
def test_damaged_checkpoint_is_passed_over_and_the_result_is_bit_identical(
    damaged: set[int], root: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_name = f"damaged-{len(damaged)}"
    interrupt(build_stage(root, run=run_name), 6, monkeypatch)
    files = StageFiles(build_stage(root, run=run_name))
    for step in damaged:
        path = files.checkpoint_dir(1, step) / "rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    resumed = run_stage(build_stage(root, run=run_name, attempt=2))
    assert (resumed.steps, resumed.samples) == (whole.steps, whole.samples)
    assert resumed.lost_steps == (3 if damaged == {6} else 6)
    assert weights(root, run_name) == weights(root, "whole")


def test_next_stage_starts_from_the_export(root: Path, whole: Result) -> None:
    first = StageFiles(build_stage(root, run="whole"))
    stage = replace(build_stage(root, run="next", train=("connector",), epochs=0.1), init_from=str(first.output))
    assert run_stage(stage).metrics["heldOutLossBefore"] == pytest.approx(whole.metrics["heldOutLoss"], abs=1e-5)
    before, after = _load(first.export), _load(StageFiles(stage).export)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if "multi_modal_projector" in name], "the rest is as it was, to the bit"


def test_non_finite_gradient_raises_naming_the_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []

    def explode(self: DeepSpeedEngine, learning_rate: float) -> float:
        steps.append(learning_rate)
        return float("inf") if len(steps) == 2 else 1.0

    monkeypatch.setattr(DeepSpeedEngine, "step", explode)
    with pytest.raises(NonFiniteError, match=r"gradient norm is inf at step 2 of \d+; .*lower learningRate"):
        run_stage(build_stage(root, run="exploding"))


BUDGETS = [
    pytest.param({"epochs": None}, id="none"),
    pytest.param({"epochs": 1.0, "tokens": 1000}, id="both"),
]


@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_without_exactly_one_of_tokens_and_epochs_raises_config_error(
    budget: dict[str, Any], root: Path
) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        run_stage(build_stage(root, run="budget", **budget))


def _load(export: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(export / "model.safetensors")
