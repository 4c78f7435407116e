"""When writes wait for the control plane: many young Jobs that lack pods."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import encode_status
from sailvl_operator.cluster.backpressure import MANY, YOUNG_SECONDS, StartupBacklog
from sailvl_operator.core.observe import observe
from sailvl_operator.core.reconcile import reconcile
from tests.support.builders.operator import build_job, build_pod, build_run
from tests.support.core_world import DEFAULTS, World

NOW = 1_000_000.0


class Stores:
    """In the place of `Children`: records by run."""

    def __init__(self, jobs, pods=()):
        self.jobs = jobs
        self.pods = self
        self._pods = pods

    def get(self, key):
        return [pod for pod in self._pods if (pod.namespace, pod.run) == key]


def build_jobs(number, **fields):
    job = build_job("curate", nodes=2, created=NOW - 5, **fields)
    return [replace(job, run=f"run-{n}", uid=f"uid-{n}") for n in range(number)]


def build_pods(jobs, indices):
    return [replace(build_pod("curate", index=i), run=job.run) for job in jobs for i in indices]


@pytest.mark.parametrize(
    ("jobs", "indices", "is_on"),
    [
        pytest.param(build_jobs(MANY + 1), (), True, id="no pods"),
        pytest.param(build_jobs(MANY + 1), (1,), True, id="some of their pods"),
        pytest.param(build_jobs(MANY + 1), (0, 1), False, id="all of their pods"),
        pytest.param(build_jobs(MANY), (), False, id="few Jobs"),
        pytest.param(build_jobs(MANY + 1, is_gone=True), (), False, id="deleted"),
        pytest.param(build_jobs(MANY + 1, is_suspended=True), (), False, id="a queue holds them"),
    ],
)
def test_rush(jobs, indices, is_on):
    rush = StartupBacklog(Stores(jobs, build_pods(jobs, indices)), clock=lambda: NOW)
    assert rush.is_high() is is_on


def test_what_lasts_is_no_rush():
    """A quota holds pods back, not the control plane."""
    jobs = [replace(job, started=NOW - YOUNG_SECONDS - 1) for job in build_jobs(MANY + 1)]
    assert not StartupBacklog(Stores(jobs), clock=lambda: NOW).is_high()


def test_a_job_that_has_had_its_pods_waits_for_the_control_plane_no_more():
    now, jobs = [0.0], build_jobs(MANY + 1)
    pods = build_pods(jobs, (0, 1))
    rush = StartupBacklog(Stores(jobs, pods), clock=lambda: NOW, monotonic=lambda: now[0])
    assert not rush.is_high()
    pods.clear()
    now[0] = 1.0
    assert not rush.is_high()


def test_it_looks_twice_a_second_at_most():
    now, jobs = [0.0], build_jobs(MANY + 1)
    rush = StartupBacklog(Stores(jobs), clock=lambda: NOW, monotonic=lambda: now[0])
    assert rush.is_high()
    jobs.clear()
    now[0] = 0.4
    assert rush.is_high()
    now[0] = 0.6
    assert not rush.is_high()


def test_a_run_s_end_is_pressing() -> None:
    """Its workers hold GPUs until it is noted."""
    world = World(spec={"activeDeadlineSeconds": 100}, is_patient=False)
    world.settle()
    run = build_run(status=encode_status(world.status), activeDeadlineSeconds=100)
    seen = observe(world.jobs.values(), world.pods.values())
    at_the_end = reconcile(run, seen, now=world.now + 101, defaults=DEFAULTS)
    assert at_the_end.status is not None
    assert at_the_end.status.is_finished
    assert not at_the_end.can_wait
