"""Training on several ranks: resume after kills, and independence of the world size."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Stage
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.builders.training import SAMPLES, build_set, build_stage, start_ranks

pytestmark = pytest.mark.slow
RANK = Path(__file__).parents[3] / "support/ranks/train.py"
LIMIT = 300
"""Timeout of the ranks in seconds."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    build_set(root / "set")
    return root


def train(root: Path, stage: Stage, world_size: int) -> list[float]:
    """Run an attempt; return the losses of its steps."""
    scratch = root / f"scratch-{stage.run}-{stage.attempt}"
    ranks = start_ranks(RANK, stage, world_size, scratch)
    codes = [process.wait(LIMIT) for process in ranks]
    assert codes == [0] * world_size, (scratch / "log-0").read_text()[-3000:]
    losses: list[float] = json.loads((scratch / "losses.json").read_bytes())
    return losses


def kill(root: Path, stage: Stage, world_size: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an attempt whose ranks kill themselves after a step."""
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "KILL_AT", str(step))
        for process in start_ranks(RANK, stage, world_size, root / f"scratch-{stage.run}-{stage.attempt}"):
            assert process.wait(LIMIT) == -signal.SIGKILL
    assert StageFiles(stage).find_newest_checkpoint(stage.attempt) is not None


@pytest.fixture(scope="module")
def whole(root: Path) -> list[float]:
    """The losses of two ranks that were never interrupted."""
    return train(root, build_stage(root, run="whole"), world_size=2)


def weights(root: Path, run: str) -> bytes:
    return (StageFiles(build_stage(root, run=run)).export / "model.safetensors").read_bytes()


def test_resume_after_killing_all_ranks_is_bit_identical(
    root: Path, whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = build_stage(root, run="killed")
    kill(root, stage, 2, 5, monkeypatch)
    assert train(root, replace(stage, attempt=2), 2) == whole[3:], "bit-identical from the checkpoint of step 3"
    assert weights(root, "killed") == weights(root, "whole")
    used = Counter(s for samples in read_trained_samples(StageFiles(stage), last_attempt=2).values() for s in samples)
    assert used == dict.fromkeys(range(SAMPLES), 2), "two epochs: every sample twice"


def test_losses_do_not_depend_on_the_world_size(root: Path, whole: list[float]) -> None:
    assert train(root, build_stage(root, run="alone"), 1) == pytest.approx(whole, abs=2e-4)


def test_checkpoint_of_two_ranks_resumes_on_three(
    root: Path, whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = build_stage(root, run="grown")
    kill(root, stage, 2, 5, monkeypatch)
    assert train(root, replace(stage, attempt=2), 3) == pytest.approx(whole[3:], abs=2e-4)
