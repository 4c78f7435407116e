"""The reconcile that the report traces: a stage of two workers has progress, and one of its pods has failed."""

from __future__ import annotations

from collections.abc import Callable

from sailvl_trainer.contract import Progress
from tests.support.core_world import World

STAGE = "alignment"
SETTLED_SECONDS = 300.0
"""Longer than the operator waits for evidence from other pods, so that it decides on the restart."""


def build_scenario() -> Callable[[], object]:
    """Return a function that reconciles a run of four stages once; the decision restarts the second stage."""
    world = World()
    while (stage := world.settle()) is not None and stage.name != STAGE:
        world.succeed(stage)
    world.now += 5
    world.progress[STAGE, 1] = Progress(attempt=1, phase="running", step=5, steps=10, seconds={"training": 4.0})
    world.step()
    world.end(0, 1)
    world.is_patient = False
    world.now += SETTLED_SECONDS

    def reconcile_once() -> object:
        return world.step()

    return reconcile_once
