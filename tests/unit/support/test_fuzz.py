"""Tests of the number of examples that fuzz tests draw, and of their count."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import strategies as st

from tests.support import fuzz


def test_examples_are_drawn_until_both_the_time_and_the_minimum_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz.COUNTER.examples = 0
    monkeypatch.setattr(fuzz, "FUZZ_SECONDS", 0.01)
    assert len(list(fuzz.draw_generators(3, minimum=5000))) >= 5000
    monkeypatch.setattr(fuzz, "FUZZ_SECONDS", 60)
    assert len(list(islice(fuzz.draw_generators(3, minimum=5), 20))) == 20
    assert fuzz.COUNTER.examples >= 5020


def test_default_number_of_examples_is_drawn_and_counted_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz.COUNTER.examples = 0
    monkeypatch.setattr(fuzz, "FUZZ_SECONDS", 0.0)
    assert len(list(fuzz.draw_generators(3))) == 3
    fuzz.fuzz(st.binary(min_size=2, max_size=2), lambda data: None, examples=10)
    assert fuzz.COUNTER.examples == 13
