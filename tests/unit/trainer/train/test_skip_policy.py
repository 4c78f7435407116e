"""Skipped ranges after non-finite losses: one batch first, then ranges that double."""

from __future__ import annotations

import pytest

from sailvl_trainer.contract import Skip
from sailvl_trainer.train.skip_policy import skip_length, widen_skip_window

ONE = Skip(first=500, last=500, step=500, failures=1)
TWO = Skip(first=450, last=549, step=500, failures=2)

CASES = [
    pytest.param((), 500, 10_000, (ONE,), id="the first failure leaves out its own batch"),
    pytest.param((ONE,), 501, 10_000, (TWO,), id="then a range around it, that begins before"),
    pytest.param(
        (TWO,), 550, 10_000, (Skip(first=400, last=599, step=500, failures=3),), id="twice as long the third time"
    ),
    pytest.param(
        (ONE,), 601, 10_000, (ONE, Skip(first=601, last=601, step=601, failures=1)), id="far away is another trouble"
    ),
    pytest.param((ONE,), 600, 10_000, (Skip(first=450, last=600, step=500, failures=2),), id="it holds both failures"),
    pytest.param(
        (Skip(first=450, last=600, step=500, failures=2),),
        601,
        10_000,
        (Skip(first=400, last=601, step=500, failures=3),),
        id="a range never shrinks",
    ),
    pytest.param(
        (Skip(first=2, last=2, step=2, failures=1),),
        3,
        8,
        (Skip(first=1, last=3, step=2, failures=2),),
        id="a short stage leaves out little, and nothing before its first step",
    ),
    pytest.param(
        (Skip(first=9999, last=9999, step=9999, failures=1),),
        10_000,
        10_000,
        (Skip(first=9949, last=10_000, step=9999, failures=2),),
        id="nor after its last",
    ),
    pytest.param(
        (ONE, Skip(first=9000, last=9000, step=9000, failures=1)),
        501,
        10_000,
        (Skip(first=9000, last=9000, step=9000, failures=1), TWO),
        id="what has changed comes last",
    ),
]


@pytest.mark.parametrize(("skips", "step", "steps", "expected"), CASES)
def test_skip_window_widens_with_repeated_failures(
    skips: tuple[Skip, ...], step: int, steps: int, expected: tuple[Skip, ...]
) -> None:
    assert widen_skip_window(skips, step, steps) == expected


LENGTHS = [
    pytest.param(10_000, [1, 100, 200, 400], id="a long stage"),
    pytest.param(1_000, [1, 20, 40, 80], id="a short one"),
    pytest.param(8, [1, 2, 4, 8], id="a tiny one"),
]


@pytest.mark.parametrize(("steps", "lengths"), LENGTHS)
def test_skip_length_doubles_with_each_failure(steps: int, lengths: list[int]) -> None:
    assert [skip_length(failures, steps) for failures in (1, 2, 3, 4)] == lengths
