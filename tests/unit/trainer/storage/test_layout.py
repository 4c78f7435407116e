"""A stage's result is written, read and found by other runs with the same digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import (
    Result,
)
from sailvl_trainer.storage.layout import StageFiles
from tests.support.builders.worker import build_stage


def test_result_of_another_run_with_the_same_digest_is_reused(tmp_path: Path) -> None:
    first, second = StageFiles(build_stage(tmp_path)), StageFiles(build_stage(tmp_path, run="again"))
    assert second.find_result() is None
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    first.write_result(result)
    assert second.find_result() == replace(result, reused=True)


def test_result_written_by_another_run_while_ranks_start_is_read(tmp_path: Path) -> None:
    """The other run writes it after this worker has checked for a result."""
    first, second = StageFiles(build_stage(tmp_path)), StageFiles(build_stage(tmp_path, run="again"))
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    with pytest.raises(FileNotFoundError):
        second.read_result()
    first.write_result(result)
    assert first.read_result() == result
    assert second.read_result() == replace(result, reused=True)


def test_result_with_another_digest_is_ignored(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    files.write_result(Result(stage="curate", kind="curate", digest="e" * 64, attempt=1, output="demo/curate"))
    assert files.find_result() is None
