"""The benchmark with a hostile tenant: its figures, and exit status 1 if one misses its target."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from bench import history
from bench.operator import tenants
from bench.operator.hostile_tenant import HostileScale
from bench.operator.tenants import Measurement, build_figures

GOOD = {
    "honest_p99_ratio": 1.5,
    "rss_mib": 300.0,
    "standby_rss_mib": 300.0,
    "standby_ready": 1.0,
    "operator_restarts": 0.0,
    "honest_reads_ratio": 1.0,
    "hostile_slow_answers": 40.0,
    "hostile_refused": 0.0,
    "hostile_started_ratio": 1.0,
    "hostile_writes_per_s": 50.0,
}


def build_measurement(*times: float, reads: float = 10.0) -> Measurement:
    return Measurement(replacements=sorted(times), reads_per_second=reads, seconds=20.0, api_write_seconds=0.01)


def run_main(figures: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[history.Record]:
    """Run `main` with these figures. Return the records that it has appended to the history."""

    async def measure(scale: HostileScale) -> dict[str, float]:
        assert scale == tenants.DEFAULT_SCALE
        return figures

    path = tmp_path / "history.jsonl"
    append = history.append_record
    monkeypatch.setattr(tenants, "measure", measure)
    monkeypatch.setattr(history, "append_record", lambda name, figures: append(name, figures, path=path))
    monkeypatch.setattr("sys.argv", ["tenants"])
    try:
        tenants.main()
    finally:
        records = history.read_records(path)
    return records


def test_exit_status_is_0_if_all_targets_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(GOOD, monkeypatch, tmp_path)
    assert not exit_.value.code
    assert capsys.readouterr().out.count("MET ") == len(GOOD)


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("honest_p99_ratio", inf),
        ("rss_mib", 513.0),
        ("standby_rss_mib", 513.0),
        ("standby_ready", 0.0),
        ("operator_restarts", 1.0),
        ("honest_reads_ratio", 0.7),
        ("hostile_slow_answers", 0.0),
        ("hostile_refused", 1.0),
        ("hostile_started_ratio", 0.9),
        ("hostile_writes_per_s", 10.0),
    ],
)
def test_exit_status_is_1_and_the_figure_is_named_if_it_misses_its_target(
    figure: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(GOOD | {figure: value}, monkeypatch, tmp_path)
    assert exit_.value.code == f"1 of {len(GOOD)} targets missed: {figure}"
    assert capsys.readouterr().out.count("MISS ") == 1
    [record] = history.read_records(tmp_path / "history.jsonl")
    assert record.figures[figure] == value


@pytest.mark.parametrize(
    ("alone", "beside", "expected"),
    [
        pytest.param(10.0, 5.0, 1.0, id="an equal share of the operator's reads"),
        pytest.param(10.0, 2.5, 0.5, id="half of an equal share"),
        pytest.param(3.0, 3.0, 1.0, id="few workers, all read as alone"),
        pytest.param(3.0, 1.5, 0.5, id="few workers, half as often as alone"),
    ],
)
def test_reads_are_compared_with_those_alone_or_with_an_equal_share(
    alone: float, beside: float, expected: float
) -> None:
    figures = build_figures(build_measurement(1, 2, reads=alone), build_measurement(1, 2, reads=beside))
    assert figures["honest_reads_ratio"] == pytest.approx(expected)


def test_replacements_are_compared_by_their_99th_percentile() -> None:
    figures = build_figures(build_measurement(1.0, 1.0), build_measurement(3.0, 3.0))
    assert (figures["honest_p99_ratio"], figures["honest_p50_beside_s"]) == (3.0, 3.0)


def test_ratio_is_infinite_if_the_operator_ended() -> None:
    assert build_figures(build_measurement(1.0, 1.0), build_measurement(inf, inf))["honest_p99_ratio"] == inf
