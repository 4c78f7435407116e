"""Targets of the benchmarks: which figures meet them, the table, and the exit status."""

from __future__ import annotations

import subprocess
import sys
from math import inf, nan

import pytest

from bench.operator import __main__ as operator_benchmark
from bench.operator import tenants
from bench.targets import Target, describe_result, find_missed, format_targets

UPPER = Target(figure="a_s", description="duration", bound=2.0)
LOWER = Target(figure="b_per_s", description="rate", bound=5.0, is_minimum=True)
TARGETS = (UPPER, LOWER)


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({"a_s": 2.0, "b_per_s": 5.0}, []),
        ({"a_s": 2.1, "b_per_s": 5.0}, ["a_s"]),
        ({"a_s": 0.0, "b_per_s": 4.9}, ["b_per_s"]),
        ({"a_s": inf, "b_per_s": inf}, ["a_s"]),
        ({"a_s": nan, "b_per_s": nan}, ["a_s", "b_per_s"]),
        ({}, ["a_s", "b_per_s"]),
    ],
    ids=["at the bounds", "too slow", "too low", "never replaced", "not a number", "not measured"],
)
def test_figures_beyond_their_bounds_are_missed(figures: dict[str, float], missed: list[str]) -> None:
    assert find_missed(TARGETS, figures) == missed


def test_table_shows_each_target_with_its_figure_and_bound() -> None:
    assert format_targets(TARGETS, {"a_s": 2.5, "b_per_s": 5.5}).splitlines() == [
        "MISS duration       2.5   target ≤ 2",
        "MET  rate           5.5   target ≥ 5",
    ]


@pytest.mark.parametrize(
    ("figures", "status", "message"),
    [
        ({"a_s": 1, "b_per_s": 6}, 0, ""),
        ({"a_s": 3, "b_per_s": 6}, 1, "1 of 2 targets missed: a_s\n"),
        ({"a_s": 3, "b_per_s": 4}, 1, "2 of 2 targets missed: a_s, b_per_s\n"),
    ],
)
def test_exit_status_is_1_if_a_target_is_missed(
    figures: dict[str, float], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = describe_result(TARGETS, figures)
    with pytest.raises(SystemExit) as exit_:
        sys.exit(result)
    assert (exit_.value.code or 0) == (message.strip() or 0)
    code = f"import sys; sys.exit({result!r})"
    done = subprocess.run([sys.executable, "-Sc", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, message)


@pytest.mark.parametrize("targets", [operator_benchmark.TARGETS, tenants.TARGETS], ids=["operator", "tenants"])
def test_each_figure_has_one_target(targets: tuple[Target, ...]) -> None:
    figures = [target.figure for target in targets]
    assert len(set(figures)) == len(figures)
