"""The operator walks at random through a model of its cluster; `run_laws.py` says what must hold at each step."""

from __future__ import annotations

import os

import pytest

from tests.support.simulation.walk import walk_along

SEEDS, STEPS = range(1, 11), 200
SEED, LONG_STEPS = int(os.environ.get("SAILVL_WALK_SEED", "0")), int(os.environ.get("SAILVL_WALK_STEPS", "0"))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_laws_hold_on_a_walk(seed):
    assert walk_along(seed, STEPS).taken == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED] if SEED else range(100, 140))
def test_the_laws_hold_on_a_longer_walk(seed):
    steps = LONG_STEPS or 500
    assert walk_along(seed, steps).taken == steps
