"""Results found again, and termination messages that are always whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import (
    ExitCode,
    Result,
    Termination,
)
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.termination import encode_termination
from sailvl_trainer.storage.codec import decode, encode, read_stage
from sailvl_trainer.storage.layout import StageFiles
from tests.support.builders.worker import build_stage


def test_another_runs_result_is_found_by_the_memo(tmp_path: Path) -> None:
    first, second = StageFiles(build_stage(tmp_path)), StageFiles(build_stage(tmp_path, run="again"))
    assert second.find_result() is None
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    first.write_result(result)
    assert second.find_result() == replace(result, reused=True)


def test_ranks_that_found_another_runs_result_leave_it_to_be_read(tmp_path: Path) -> None:
    """It was written after this worker's own first look, while its ranks started."""
    first, second = StageFiles(build_stage(tmp_path)), StageFiles(build_stage(tmp_path, run="again"))
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    with pytest.raises(FileNotFoundError):
        second.read_result()
    first.write_result(result)
    assert first.read_result() == result
    assert second.read_result() == replace(result, reused=True)


def test_a_result_of_another_digest_is_none(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    files.write_result(Result(stage="curate", kind="curate", digest="e" * 64, attempt=1, output="demo/curate"))
    assert files.find_result() is None


LONG = [
    pytest.param({"message": "m" * 9000}, id="a long message"),
    pytest.param({"traceback": "é" * 9000}, id="a long traceback of two-byte letters"),
    pytest.param({"message": '"\\' * 4000, "traceback": "\n" * 5000}, id="letters that JSON escapes"),
]


@pytest.mark.parametrize("words", LONG)
def test_a_termination_message_is_whole_and_short_enough(words: dict[str, str]) -> None:
    data = encode_termination(Termination(exit_code=1, rank=3, **words))
    assert len(data) <= 4096
    assert decode(Termination, data).rank == 3


def test_a_result_of_many_metrics_still_fits() -> None:
    result = Result(
        stage="e",
        kind="evaluate",
        digest="d",
        attempt=1,
        output="o",
        metrics={f"metric-{i:04d}": 1 / 3 for i in range(300)},
    )
    found = decode(Termination, encode_termination(Termination(exit_code=0, result=result)))
    assert found.result is not None
    assert found.result.metrics["metric-0000"] == pytest.approx(1 / 3)


def test_a_stage_document_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(replace(build_stage(tmp_path), schema_version=2)))
    with pytest.raises(ConfigError, match="schema version 2") as error:
        read_stage(path)
    assert error.value.exit_code == ExitCode.CONFIG
