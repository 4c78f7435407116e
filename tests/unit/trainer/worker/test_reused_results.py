"""Whole workers that find another run's result: they reuse it if its files are intact, and else compute the stage."""

from __future__ import annotations

import shutil
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
from tests.support.builders.worker import build_stage
from tests.support.worker_processes import TRAINER, WorkerProcesses

pytestmark = pytest.mark.slow
OTHER = "other/curate"
SAMPLES = 16


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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], WorkerProcesses]]:
    """Return a function that builds the workers of a curation."""
    with ExitStack() as resources:
        yield lambda nodes: WorkerProcesses(
            folder=tmp_path,
            stage=build_curation(tmp_path),
            resources=resources,
            nodes=nodes,
            rank_module=TRAINER,
        )


def test_intact_result_that_appears_while_a_worker_waits_is_reused_by_all(
    start: Callable[[int], WorkerProcesses], tmp_path: Path
) -> None:
    workers = start(2)
    workers.start(1)
    workers.wait_for(lambda: workers.read_progress(1) is not None)
    result = write_other_result(tmp_path)
    workers.start(0)
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [0, 0], workers.read_logs()
    assert [termination.result for termination in ended] == [result, None]
    verified = "".join(path.read_text() for path in (tmp_path / "demo/verified").iterdir())
    assert verified.count(str(tmp_path / OTHER)) == 4, "each tar and each index is hashed once"
    assert not (tmp_path / "demo/curate").exists()


def test_result_whose_files_are_missing_is_computed_again_with_a_warning(
    start: Callable[[int], WorkerProcesses], tmp_path: Path
) -> None:
    write_other_result(tmp_path)
    shutil.rmtree(tmp_path / OTHER / "shards")
    workers = start(1)
    workers.start()
    result = workers.wait_for_end().result
    assert result is not None, workers.read_log()
    assert (result.output, result.reused) == ("demo/curate", False)
    assert (tmp_path / "demo/curate/shards/00000.tar").exists()
    assert f"WARNING the result in {OTHER} is not reused but computed again: " in workers.read_log()
    third = StageFiles(build_stage(tmp_path, run="third"))
    assert third.find_result() == replace(result, reused=True), "other runs find the new result from now on"
