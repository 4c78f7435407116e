"""Workers that find another run's result reuse it without ranks if its files are intact, else compute the stage."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import CurateConfig, Result, SourceConfig, Stage
from sailvl_trainer.data.shards import ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.shard_manifest import write_shard_manifest
from sailvl_trainer.worker import reused_result
from sailvl_trainer.worker.reused_result import reuse_result
from tests.support.builders.worker import build_stage
from tests.support.read_failures import fail_calls
from tests.support.worker_processes import TRAINER, WorkerProcesses

OTHER = "other/curate"
FILES = 4
"""Files of the other run's result: a tar and an index of each split."""
SAMPLES = 16
Build = Callable[..., WorkerProcesses]


def build_curation(root: Path) -> Stage:
    source = SourceConfig(path="", format="procedural", samples=SAMPLES)
    return replace(build_stage(root), curate=CurateConfig(sources=(source,), shard_samples=SAMPLES, max_tiles=4))


def write_other_result(root: Path) -> Result:
    """Write the output of another run's stage with the same digest, and return its result as it is reused."""
    files = StageFiles(build_stage(root, run="other"))
    for directory in (files.shards, files.held_out):
        with ShardWriter(directory, "00000") as writer:
            writer.write(draw_question(0, 0, 1))
        assert writer.info is not None
        write_shard_manifest(directory, [writer.info])
    result = Result(
        stage="curate", kind="curate", digest="d" * 64, attempt=3, output=OTHER, samples=2, metrics={"kept": 2.0}
    )
    files.write_result(result)
    return replace(result, reused=True)


def count_records(root: Path) -> int:
    """Return how often the record of verified files names a file of the other run."""
    return "".join(path.read_text() for path in (root / "demo/verified").glob("*.jsonl")).count(str(root / OTHER))


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Return a function that builds the workers of a curation, with variables for their environment."""
    with ExitStack() as resources:
        yield lambda nodes, **environment: WorkerProcesses(
            folder=tmp_path,
            stage=build_curation(tmp_path),
            resources=resources,
            nodes=nodes,
            rank_module=TRAINER,
            environment=environment,
        )


@pytest.mark.parametrize("nodes", [1, 2])
def test_intact_result_is_reused_by_all_workers_without_importing_torch(
    nodes: int, build: Build, tmp_path: Path
) -> None:
    result = write_other_result(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    workers = build(nodes, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    workers.start_all()
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [0] * nodes, workers.read_logs()
    assert [termination.result for termination in ended] == [result, None][:nodes]
    assert count_records(tmp_path) == FILES
    assert not (tmp_path / "demo/curate").exists(), "the stage isn't claimed"


@pytest.mark.slow
def test_intact_result_that_appears_while_a_worker_waits_is_reused_by_all(build: Build, tmp_path: Path) -> None:
    workers = build(2)
    workers.start(1)
    workers.wait_for(lambda: workers.read_progress(1) is not None)
    result = write_other_result(tmp_path)
    workers.start(0)
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [0, 0], workers.read_logs()
    assert [termination.result for termination in ended] == [result, None]
    assert count_records(tmp_path) == FILES


@pytest.mark.slow
def test_result_that_takes_long_to_verify_is_verified_and_reused_by_the_ranks(build: Build, tmp_path: Path) -> None:
    result = write_other_result(tmp_path)
    workers = build(2, VERIFICATION_SECONDS=0)
    workers.start_all()
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [0, 0], workers.read_logs()
    assert [termination.result for termination in ended] == [result, None]
    assert count_records(tmp_path) == FILES, "each file is hashed once"
    assert "its files were not verified within 0 s" in workers.read_log()
    assert not (tmp_path / "demo/curate").exists()


def remove_files(output: Path) -> None:
    shutil.rmtree(output / "shards")


def cut_off_shard(output: Path) -> None:
    os.truncate(output / "shards/00000.tar", 99)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [remove_files, cut_off_shard], ids=lambda damage: damage.__name__)
def test_damaged_result_is_computed_again_with_a_warning(
    damage: Callable[[Path], None], build: Build, tmp_path: Path
) -> None:
    write_other_result(tmp_path)
    damage(tmp_path / OTHER)
    workers = build(1)
    workers.start()
    result = workers.wait_for_end().result
    assert result is not None, workers.read_log()
    assert (result.output, result.reused) == ("demo/curate", False)
    assert (tmp_path / "demo/curate/shards/00000.tar").exists()
    assert f"WARNING the result in {OTHER} is not reused but computed again: " in workers.read_log()
    third = StageFiles(build_stage(tmp_path, run="third"))
    assert third.find_result() == replace(result, reused=True), "other runs find the new result from now on"


# The decision of a single worker.


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    """Return the files of a stage for which another run has a result."""
    write_other_result(tmp_path)
    return StageFiles(build_curation(tmp_path))


def flip_bit(output: Path) -> None:
    path = output / "held-out/00000.arrow"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_manifest(output: Path) -> None:
    (output / "held-out/manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip_bit, remove_files, remove_manifest], ids=lambda damage: damage.__name__)
def test_damaged_result_is_left_to_the_ranks(
    damage: Callable[[Path], None], files: StageFiles, caplog: pytest.LogCaptureFixture
) -> None:
    damage(files.storage / OTHER)
    caplog.set_level(logging.INFO)
    assert reuse_result(files, build_curation(files.storage), is_first=True) is None
    assert files.find_usable_result() is None
    assert f"the ranks decide whether the result of {OTHER} is reused: " in caplog.text


@pytest.mark.parametrize("failing", [("open", "00000.tar"), ("stat", "00000.tar"), ("open", "result.json")])
def test_result_that_cannot_be_read_at_the_moment_is_left_to_the_ranks(
    failing: tuple[str, str], files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_calls(monkeypatch, *failing, errno.ETIMEDOUT)
    assert reuse_result(files, build_curation(files.storage), is_first=True) is None


def test_verification_stops_once_its_time_has_passed(files: StageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused_result, "VERIFICATION_SECONDS", 0.0)
    assert reuse_result(files, build_curation(files.storage), is_first=True) is None
    assert not files.verified.exists()


def test_other_workers_wait_for_the_decision_of_worker_0_only_for_a_while(
    files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = build_curation(files.storage)
    monkeypatch.setattr(reused_result, "PEER_SECONDS", 0.0)
    assert reuse_result(files, stage, is_first=False) is None
    reused = reuse_result(files, stage, is_first=True)
    assert reused is not None
    assert reuse_result(files, stage, is_first=False) == reused
