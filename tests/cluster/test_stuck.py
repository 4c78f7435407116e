"""Runs that something holds back, on a real cluster: one condition names it, in the words of who does; once it is out
of the way, they go on.

All obstacles stand at once, each in the way of a run of its own; then all are taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.live.api import Api, until
from tests.support.live.cluster import Kubectl
from tests.support.live.obstacles import OBSTACLES, Obstacle, clean, create, is_denied
from tests.support.live.replicas import Replica
from tests.support.live.stub_runs import Place, Run, build_image, open_operator, open_place

pytestmark = pytest.mark.cluster

EVERY = pytest.mark.parametrize("obstacle", [pytest.param(each, id=each.name) for each in OBSTACLES])


@pytest.fixture(scope="module")
def places(cluster: Any, kubeconfig: str, resource: None) -> Iterator[dict[str, Place]]:
    if not cluster.is_ours:
        pytest.skip("the test makes volumes of folders: it needs the cluster of `make cluster`")
    image = build_image(cluster.registry)
    with Api(kubeconfig) as api, ExitStack() as stack:
        rooms = dict.fromkeys(obstacle.room for obstacle in OBSTACLES)
        yield {room: stack.enter_context(open_place(api, image, prefix="stuck")) for room in rooms}


@pytest.fixture(scope="module", autouse=True)
def operator(places: dict[str, Place], kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("operator")
    with open_operator(kubeconfig, list(places.values()), folder) as operator:
        yield operator


@pytest.fixture(scope="module")
def runs(operator: Replica, places: dict[str, Place]) -> Iterator[dict[str, Run]]:
    """One in front of each obstacle."""
    try:
        for obstacle in OBSTACLES:
            obstacle.put(places[obstacle.room], obstacle.name)
        for name in ("no-pods", "no-jobs", "deaf-pods", "deaf-jobs"):
            until(lambda name=name: is_denied(places["common"], name))
        yield {each.name: create(each, places[each.room]) for each in OBSTACLES}
    finally:
        clean(places["common"])


@pytest.fixture(scope="module")
def mended(places: dict[str, Place], runs: dict[str, Run]) -> dict[str, Run]:
    """After every obstacle was seen, all are taken away."""
    for obstacle in OBSTACLES:
        run = runs[obstacle.name]
        until(lambda run=run: run.is_true("Stuck"), told=run.describe)
        obstacle.mend(run.place, run)
    return runs


@EVERY
def test_the_condition_says_who_holds_a_run_back(obstacle: Obstacle, runs: dict[str, Run], kubectl: Kubectl) -> None:
    run = runs[obstacle.name]
    until(lambda: obstacle.words in run.condition("Stuck")[2], told=run.describe)
    assert run.condition("Stuck")[:2] == ("True", obstacle.reason)
    row = kubectl("-n", run.place.namespace, "get", "svr", run.name, "--no-headers").stdout
    assert obstacle.reason in row.split()
    until(lambda: obstacle.reason in run.events())
    assert not run.is_true("Failed")


@EVERY
def test_once_it_is_out_of_the_way_the_run_goes_on(obstacle: Obstacle, mended: dict[str, Run]) -> None:
    run = mended[obstacle.name]
    run.until_true("Succeeded")
    assert run.condition("Stuck") == ("False", "NotStuck", "")
    stage = run.stage()
    assert (stage["state"], stage["attempt"], stage.get("restarts", {})) == ("Succeeded", obstacle.attempts, {})
