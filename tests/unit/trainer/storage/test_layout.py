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


def test_result_of_another_run_is_usable_once_the_attempt_has_recorded_its_reuse(tmp_path: Path) -> None:
    """Until then, no worker has verified its files; and a later attempt verifies them again."""
    first, second = StageFiles(build_stage(tmp_path)), StageFiles(build_stage(tmp_path, run="again"))
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    with pytest.raises(FileNotFoundError):
        second.read_result()
    first.write_result(result)
    assert first.read_result() == result
    with pytest.raises(FileNotFoundError):
        second.read_result()
    assert second.find_usable_result() is None
    second.record_reuse(result)
    assert second.read_result() == second.find_usable_result() == replace(result, reused=True)
    assert StageFiles(build_stage(tmp_path, run="again", attempt=2)).find_usable_result() is None


def test_reused_result_stays_the_one_that_was_verified(tmp_path: Path) -> None:
    """A third run may replace the digest's pointer by one to its own output at any time."""
    files = {run: StageFiles(build_stage(tmp_path, run=run)) for run in ("demo", "again", "third")}
    results = {
        run: Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output=f"{run}/curate")
        for run in ("demo", "third")
    }
    files["demo"].write_result(results["demo"])
    files["again"].record_reuse(results["demo"])
    files["third"].write_result(results["third"])
    assert files["again"].read_result() == replace(results["demo"], reused=True)


def test_result_with_another_digest_is_ignored(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    files.write_result(Result(stage="curate", kind="curate", digest="e" * 64, attempt=1, output="demo/curate"))
    assert files.find_result() is None
