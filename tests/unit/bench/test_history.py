"""The benchmark history: records are appended and read back, and grouped into series that can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.history import HISTORY, Record, append_record, group_series, plot_history, read_records


def build_record(*, commit: str = "1234567", cores: int = 2, **figures: float) -> Record:
    return Record(date="2026-01-31", commit=commit, cores=cores, benchmark="operator", figures=figures)


def test_appended_records_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "bench/history.jsonl"
    written = [
        append_record("operator", {"pods_s": 37.4}, path=path),
        append_record("checkpoint", {"save": 1}, path=path),
    ]
    assert read_records(path) == written
    assert written[0].cores >= 1
    assert written[0].commit


def test_missing_history_is_empty(tmp_path: Path) -> None:
    assert read_records(tmp_path / "history.jsonl") == []


@pytest.mark.parametrize("line", ["{", '{"date": "2026-01-31"}', "[]", '{"other": 1}'])
def test_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    append_record("operator", {"pods_s": 37.4}, path=path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl:2: not a record"):
        read_records(path)


def test_series_are_separate_by_figure_and_cores() -> None:
    records = [build_record(a=1.0, b=2.0), build_record(commit="2345678", a=3.0), build_record(cores=8, a=0.5)]
    assert group_series(records) == {
        "operator: a": {
            2: [("2026-01-31\n1234567", 1.0), ("2026-01-31\n2345678", 3.0)],
            8: [("2026-01-31\n1234567", 0.5)],
        },
        "operator: b": {2: [("2026-01-31\n1234567", 2.0)]},
    }


def test_plot_is_written(tmp_path: Path) -> None:
    plot_history([build_record(a=1.0, b=2.0)], tmp_path / "plots/history.png")
    assert (tmp_path / "plots/history.png").stat().st_size > 1000


def test_committed_history_is_readable() -> None:
    assert all(record.figures for record in read_records(HISTORY))
