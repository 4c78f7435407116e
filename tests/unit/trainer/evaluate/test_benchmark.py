"""Tests of the checks that a benchmark passes before the first answer is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.contract import Metric
from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.benchmark import check_benchmark
from tests.support.builders.evaluation import build_benchmark, build_row, write_tsv

UNSCORABLE: list[Any] = [
    pytest.param("multiple_choice", {"answer": "C", "A": "x", "B": "y"}, "its choices are A, B", id="unknown choice"),
    pytest.param("multiple_choice", {"answer": "A"}, "its choices are none", id="no choices"),
    pytest.param("anls", {"answer": "[]"}, "an empty list", id="no accepted answer"),
    pytest.param("yes_no_f1", {"answer": "maybe"}, "needs yes or no", id="neither yes nor no"),
]


@pytest.mark.parametrize(("metric", "cells", "message"), UNSCORABLE)
def test_question_that_the_metric_cannot_score_is_an_error(
    metric: Metric, cells: dict[str, str], message: str, tmp_path: Path
) -> None:
    benchmark = build_benchmark(write_tsv(tmp_path / "b.tsv", [build_row(**cells)]), metric)
    with pytest.raises(DataError, match=message):
        check_benchmark(benchmark, 0, tmp_path)


def test_check_returns_the_number_of_questions_within_the_limit(tmp_path: Path) -> None:
    rows = [build_row(index=str(i)) for i in range(3)]
    benchmark = build_benchmark(write_tsv(tmp_path / "b.tsv", rows))
    assert [check_benchmark(benchmark, limit, tmp_path) for limit in (0, 2)] == [3, 2]


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        pytest.param("gone.tsv", "exact_match", "gone.tsv", id="missing file"),
        pytest.param("", "caption_loss", "set path to a directory of shards", id="directory without shards"),
    ],
)
def test_missing_data_is_an_error(name: str, metric: Metric, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        check_benchmark(build_benchmark(tmp_path / name, metric), 0, tmp_path)
