"""Helpers of the fuzz tests."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.support import fuzz


def test_failing_example_is_shrunk_and_names_its_seed():
    def check(number: int) -> None:
        assert number < 1000

    with pytest.raises(AssertionError) as caught:
        fuzz.fuzz(st.integers(), check)
    assert any("example=1000" in note for note in caught.value.__notes__)
    assert "repeat with SAILVL_FUZZ_SEED=0" in caught.value.__notes__


def test_same_seed_gives_the_same_examples():
    batches = [[], []]
    for batch in batches:
        fuzz.fuzz(st.binary(), batch.append, examples=20)
    assert batches[0] == batches[1]
    assert len(batches[0]) >= 20
    first, second = ([fuzz.mutate_bytes(b"content", g) for g in fuzz.draw_generators(20)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 15


def test_budget_of_seconds_draws_new_examples_until_it_is_spent(monkeypatch):
    monkeypatch.setattr(fuzz, "FUZZ_SECONDS", 0.1)
    drawn = [generator.number for generator in fuzz.draw_generators(1)]
    assert len(drawn) > 1
    assert drawn == sorted(set(drawn))
