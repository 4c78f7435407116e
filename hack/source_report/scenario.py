"""The reconcile that the report traces: a stage of two workers has progress, and one of its pods has failed."""

from __future__ import annotations

from collections.abc import Callable

from sailvl_trainer.contract import Progress
from tests.support.core_world import CoreWorld

STAGE = "alignment"
SETTLED_SECONDS = 300.0
"""Longer than the operator waits for evidence from other pods, so that it decides on the restart."""


def build_scenario() -> Callable[[], object]:
    """Return a function that reconciles a run of four stages once; the decision restarts the second stage."""
    world = CoreWorld()
    while (stage := world.run_until_stable()) is not None and stage.name != STAGE:
        world.succeed_stage(stage)
    world.now += 5
    world.progress[STAGE, 1] = Progress(attempt=1, phase="running", step=5, steps=10, seconds={"training": 4.0})
    world.reconcile_once()
    world.end_worker(0, 1)
    world.advances_time = False
    world.now += SETTLED_SECONDS

    def reconcile_once() -> object:
        return world.reconcile_once()

    return reconcile_once
