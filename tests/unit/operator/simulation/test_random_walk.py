"""The operator keeps all invariants on random walks through a simulated cluster."""

from __future__ import annotations

import os

import pytest

from tests.support.builders.operator import SPEC, build_document
from tests.support.simulation.clock import run_in_virtual_time
from tests.support.simulation.walk import RandomWalk, run_walk

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


def test_restarts_are_rare_while_workers_claim_preemption_at_once():
    walk = RandomWalk(1)

    async def pass_an_hour() -> None:
        walk.cluster.workers.claim_preemption = True
        walk.start_operator()
        walk.api.create("sailvlruns", build_document(stages=SPEC["stages"][2:3]), by="a user")
        for _ in range(60):
            await walk.pass_time(60.0)
        await walk.kill_operator()

    run_in_virtual_time(pass_an_hour())
    [stage, *_] = walk.status.stages
    assert (stage.state, set(stage.restarts)) == ("Restarting", {"Preempted"})
    assert stage.restarts["Preempted"] < 30
