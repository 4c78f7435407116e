"""Ranks of every kind of stage end: by a bug, a full volume or a stop request; the next attempt then succeeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from sailvl_trainer.contract import CurateConfig, ExitCode, ModelConfig, SourceConfig, Stage
from sailvl_trainer.storage.layout import StageFiles
from tests.support.builders import evaluation, training
from tests.support.rank_faults import (
    BALLAST,
    FaultyRanks,
    Volume,
    do_nothing,
    fill_volume,
    inject_at,
    next_attempt,
    provide_volume,
    raise_bug,
    request_stop,
)

pytestmark = pytest.mark.slow


def build_curation(root: Path) -> Stage:
    config = CurateConfig(
        sources=(SourceConfig(path="", format="procedural", samples=24),), shard_samples=16, max_tiles=4
    )
    return Stage(
        namespace="team",
        run="demo",
        stage="curate",
        kind="curate",
        attempt=1,
        digest="curate",
        storage=str(root),
        output=str(root / "demo" / "curate"),
        model=ModelConfig(preset="tiny"),
        curate=config,
    )


def build_training(root: Path) -> Stage:
    training.build_set(root / "set")
    return training.build_stage(root, epochs=0.5)


def build_evaluation(root: Path) -> Stage:
    evaluation.export_untrained(root)
    questions = evaluation.write_questions(root / "colours.tsv")
    return evaluation.build_stage(root, evaluation.build_benchmark(questions))


Build = Callable[[Path], Stage]
BUGS = [
    pytest.param(build_curation, "writing a shard", "writer.write", id="curate"),
    pytest.param(build_training, "step 1", "self._record_step", id="train"),
    pytest.param(build_evaluation, "keeping answers", "cache.add", id="evaluate"),
]


@pytest.mark.parametrize(("build", "point", "code"), BUGS)
def test_bug_is_reported_with_its_traceback(build: Build, point: str, code: str, tmp_path: Path) -> None:
    ranks = FaultyRanks(build(tmp_path / "storage"), 1, [inject_at(point, raise_bug)])
    assert ranks.wait_for_codes() == [1], ranks.read_logs()
    ended = ranks.read_termination()
    assert (ended.exit_code, ended.rank, ended.message) == (1, 0, "ValueError: a plain mistake")
    assert code in ended.traceback
    assert ended.traceback.endswith("ValueError: a plain mistake\n")


WRITES = [
    pytest.param(build_curation, "writing a shard", id="a shard"),
    pytest.param(build_curation, "writing the report of curation", id="the report of curation"),
    pytest.param(build_evaluation, "keeping answers", id="answers"),
    pytest.param(build_evaluation, "writing the report of evaluation", id="the report of evaluation"),
]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    yield from provide_volume(tmp_path, is_disk=False)


@pytest.mark.parametrize(("build", "point"), WRITES)
def test_full_volume_leaves_no_partial_output(build: Build, point: str, volume: Volume, tmp_path: Path) -> None:
    stage = build(volume.path)
    ranks = FaultyRanks(stage, 1, [inject_at(point, partial(fill_volume, volume.path))])
    assert ranks.wait_for_codes() == [ExitCode.STORAGE], ranks.read_logs()
    assert f"the volume {volume.path} is full: " in ranks.read_termination().message
    assert StageFiles(stage).find_result() is None
    (volume.path / BALLAST).unlink()
    again = next_attempt(stage)
    ranks = FaultyRanks(again, 1)
    assert ranks.wait_for_codes() == [0], ranks.read_logs()
    (tmp_path / "whole").mkdir()
    whole = build(tmp_path / "whole")
    assert FaultyRanks(whole, 1).wait_for_codes() == [0]
    assert hash_outputs(again) == hash_outputs(whole)
    assert StageFiles(again).read_result().metrics == StageFiles(whole).read_result().metrics


@pytest.mark.parametrize("build", [build_curation, build_evaluation], ids=["curate", "evaluate"])
def test_all_ranks_stop_when_one_is_asked_to(build: Build, tmp_path: Path) -> None:
    stage = build(tmp_path / "storage")
    ranks = FaultyRanks(stage, faults=[do_nothing, request_stop])
    assert ranks.wait_for_codes() == [ExitCode.PREEMPTED, ExitCode.PREEMPTED], ranks.read_logs()
    assert StageFiles(stage).find_result() is None
    ranks = FaultyRanks(next_attempt(stage))
    assert ranks.wait_for_codes() == [0, 0], ranks.read_logs()


def hash_outputs(stage: Stage) -> dict[str, str]:
    """Return the digests of the files that other stages read; reports, which contain times and paths, are left out."""
    output = Path(stage.output)
    found = (path for part in ("shards", "held-out", "report/predictions.jsonl") for path in list_files(output / part))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def list_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
