"""The operator keeps all invariants on random walks through a simulated cluster."""

from __future__ import annotations

import os

import pytest

from tests.support.simulation.walk import run_walk

SEEDS, STEPS = range(1, 6), 200
SEED, LONG_STEPS = int(os.environ.get("SAILVL_WALK_SEED", "0")), int(os.environ.get("SAILVL_WALK_STEPS", "0"))


@pytest.mark.parametrize("seed", SEEDS)
def test_invariants_hold_on_short_walk(seed):
    assert run_walk(seed, STEPS).steps_taken == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED] if SEED else range(100, 140))
def test_invariants_hold_on_long_walk(seed):
    steps = LONG_STEPS or 500
    assert run_walk(seed, steps).steps_taken == steps
