"""Skipped ranges after non-finite losses: one batch first, then ranges that double."""

from __future__ import annotations

import pytest

from sailvl_trainer.contract import Skip
from sailvl_trainer.train.skip_policy import skip_length, widen_skip_window

ONE = Skip(first=500, last=500, step=500, failures=1)
TWO = Skip(first=450, last=549, step=500, failures=2)

CASES = [
    pytest.param((), 500, 10_000, (ONE,), id="first failure skips its own batch"),
    pytest.param((ONE,), 501, 10_000, (TWO,), id="second failure skips a range around the first"),
    pytest.param(
        (TWO,), 550, 10_000, (Skip(first=400, last=599, step=500, failures=3),), id="third failure doubles the range"
    ),
    pytest.param(
        (ONE,),
        601,
        10_000,
        (ONE, Skip(first=601, last=601, step=601, failures=1)),
        id="distant failure starts a new range",
    ),
    pytest.param(
        (ONE,), 600, 10_000, (Skip(first=450, last=600, step=500, failures=2),), id="range holds both failures"
    ),
    pytest.param(
        (Skip(first=450, last=600, step=500, failures=2),),
        601,
        10_000,
        (Skip(first=400, last=601, step=500, failures=3),),
        id="range never shrinks",
    ),
    pytest.param(
        (Skip(first=2, last=2, step=2, failures=1),),
        3,
        8,
        (Skip(first=1, last=3, step=2, failures=2),),
        id="short stage skips little and nothing before step 1",
    ),
    pytest.param(
        (Skip(first=9999, last=9999, step=9999, failures=1),),
        10_000,
        10_000,
        (Skip(first=9949, last=10_000, step=9999, failures=2),),
        id="range ends at the last step",
    ),
    pytest.param(
        (ONE, Skip(first=9000, last=9000, step=9000, failures=1)),
        501,
        10_000,
        (Skip(first=9000, last=9000, step=9000, failures=1), TWO),
        id="changed range comes last",
    ),
]


@pytest.mark.parametrize(("skips", "step", "steps", "expected"), CASES)
def test_skip_window_widens_with_repeated_failures(
    skips: tuple[Skip, ...], step: int, steps: int, expected: tuple[Skip, ...]
) -> None:
    assert widen_skip_window(skips, step, steps) == expected


LENGTHS = [
    pytest.param(10_000, [1, 100, 200, 400], id="long stage"),
    pytest.param(1_000, [1, 20, 40, 80], id="short stage"),
    pytest.param(8, [1, 2, 4, 8], id="tiny stage"),
]


@pytest.mark.parametrize(("steps", "lengths"), LENGTHS)
def test_skip_length_doubles_with_each_failure(steps: int, lengths: list[int]) -> None:
    assert [skip_length(failures, steps) for failures in (1, 2, 3, 4)] == lengths
