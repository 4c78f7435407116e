"""A real NaN in loss or gradient: which data is skipped, and that nothing else changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from sailvl_trainer.contract import NonFinite, Skip, Stage
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import read_lineage, read_non_finite
from sailvl_trainer.train.sample_log import read_skipped_samples, read_trained_samples
from tests.support.builders.training import build_set, build_stage
from tests.support.rank_faults import (
    FaultyRanks,
    combine_faults,
    inject_at,
    kill_process,
    make_images_nan,
    next_attempt,
    ruin_weights,
)

pytestmark = pytest.mark.slow
NON_FINITE = 66


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    build_set(root / "set")
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[int, list[int]]:
    """The samples of each step of an undisturbed stage."""
    stage = build_stage(root, run="whole")
    ranks = FaultyRanks(stage)
    assert ranks.wait_for_codes() == [0, 0], ranks.read_logs()
    return read_trained_samples(StageFiles(stage), 1)


def weights(stage: Stage) -> bytes:
    return (StageFiles(stage).export / "model.safetensors").read_bytes()


def assert_every_sample_is_accounted_for(stage: Stage, attempt: int, whole: dict[int, list[int]]) -> None:
    """Assert that each step has its usual samples, all of them either trained or skipped."""
    files = StageFiles(stage)
    trained, skipped = read_trained_samples(files, attempt), read_skipped_samples(files, attempt)
    assert trained | skipped == whole
    result = files.read_result()
    assert result.steps == len(whole)
    assert result.samples == sum(map(len, trained.values()))
    assert result.metrics["skippedSamples"] == sum(map(len, skipped.values()))


def test_batch_with_nan_loss_is_skipped_and_other_steps_are_unchanged(root: Path, whole: dict[int, list[int]]) -> None:
    """The sample fails once per epoch, on one of two ranks: two independent failures."""
    stage = build_stage(root, run="spoilt")
    files, again = StageFiles(stage), 8 if set(whole[4]) & set(whole[8]) else 7
    bad = min(set(whole[4]) & set(whole[again]))
    first = FaultyRanks(stage, faults=[partial(make_images_nan, bad)])
    assert first.wait_for_codes() == [NON_FINITE, NON_FINITE], first.read_logs()
    assert first.read_termination().message == (
        "the loss is nan at step 4 of 8; the next attempt will skip the data of step 4; if it happens again, check "
        "that data, or lower learningRate"
    )
    skips = (Skip(first=4, last=4, step=4, failures=1), Skip(first=again, last=again, step=again, failures=1))
    assert read_non_finite(files, 1) == NonFinite(
        attempt=1, step=4, quantity="loss", value="nan", samples=tuple(whole[4]), max_resume_step=3, skips=skips[:1]
    )
    for step, left_out in ((3, skips[:1]), (6, skips)):
        stage = next_attempt(stage)
        codes = FaultyRanks(stage, faults=[partial(make_images_nan, bad)]).wait_for_codes()
        lineage = read_lineage(files, stage.attempt)
        assert lineage is not None
        assert (lineage.start and lineage.start.step, lineage.skips) == (step, left_out)
    assert codes == [0, 0]
    assert_every_sample_is_accounted_for(stage, 3, whole)
    assert set(read_skipped_samples(files, 3)) == {4, again}


def test_kill_after_a_skipped_step_does_not_change_the_weights(root: Path, whole: dict[int, list[int]]) -> None:
    """The optimizer's step count is that of updates; with skipped steps included, the resumed run would differ."""
    ends = {}
    for name in ("plain", "killed"):
        stage = build_stage(root, run=f"clock-{name}", epochs=1.0)
        fault = partial(make_images_nan, whole[2][0])
        assert FaultyRanks(stage, 1, faults=[fault]).wait_for_codes() == [NON_FINITE]
        last = next_attempt(stage)
        if name == "killed":
            faults = [partial(combine_faults, fault, inject_at("step 4", kill_process))]
            assert FaultyRanks(last, 1, faults=faults).wait_for_codes()[0] < 0
            assert StageFiles(stage).find_newest_checkpoint(2) is not None
            last = next_attempt(last)
        assert FaultyRanks(last, 1, faults=[fault]).wait_for_codes() == [0]
        assert set(read_skipped_samples(StageFiles(stage), last.attempt)) == {2}
        ends[name] = weights(stage)
    assert ends["plain"] == ends["killed"]


def test_repeated_failure_resumes_before_the_ruined_checkpoint(root: Path, whole: dict[int, list[int]]) -> None:
    """Each step is saved, so the newest checkpoint holds ruined weights, and skipping later data doesn't help."""
    stage = build_stage(root, run="exploded", checkpoint_steps=1, keep_checkpoints=3)
    files, fault = StageFiles(stage), partial(ruin_weights, 4)
    starts = []
    for _ in range(2):
        ranks = FaultyRanks(stage, 1, faults=[fault])
        assert ranks.wait_for_codes() == [NON_FINITE], ranks.read_logs()
        lineage, failure = read_lineage(files, stage.attempt), read_non_finite(files, stage.attempt)
        assert lineage is not None
        assert failure is not None
        starts.append((lineage.start and lineage.start.step, failure.step))
        stage = next_attempt(stage)
    assert starts == [(None, 5), (4, 6)]
    assert FaultyRanks(stage, 1, faults=[fault]).wait_for_codes() == [0]
    lineage = read_lineage(files, 3)
    assert lineage is not None
    assert (lineage.start and lineage.start.step, lineage.skips) == (3, (Skip(first=4, last=6, step=5, failures=2),))
    assert_every_sample_is_accounted_for(stage, 3, whole)
    assert set(read_skipped_samples(files, 3)) == {4, 5, 6}


def test_non_finite_validation_loss_raises_before_export(root: Path) -> None:
    stage = build_stage(root, run="broken", learning_rate=1e30, warmup_ratio=0.0, epochs=0.1)
    ranks = FaultyRanks(stage, 1)
    assert ranks.wait_for_codes() == [NON_FINITE], ranks.read_logs()
    assert "the held-out loss is " in ranks.read_termination().message
    assert not StageFiles(stage).export.exists()
