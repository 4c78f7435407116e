"""Backpressure: many young Jobs that lack pods."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import encode_status
from sailvl_operator.cluster.backpressure import HIGH_BACKLOG_JOBS, YOUNG_SECONDS, StartupBacklog
from sailvl_operator.core.observe import Obstacle, observe
from sailvl_operator.core.reconcile import reconcile
from tests.support.builders.operator import build_job, build_pod, build_run
from tests.support.core_world import DEFAULTS, CoreWorld

NOW = 1_000_000.0


class Stores:
    """Records by run, in place of `OwnedObjects`."""

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
    return [replace(build_pod("curate", index=i), run=job.run, owner_uid=job.uid) for job in jobs for i in indices]


@pytest.mark.parametrize(
    ("jobs", "indices", "is_high"),
    [
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS + 1), (), True, id="no pods"),
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS + 1), (1,), True, id="some of their pods"),
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS + 1), (0, 1), False, id="all of their pods"),
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS), (), False, id="few Jobs"),
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS + 1, is_gone=True), (), False, id="deleted"),
        pytest.param(build_jobs(HIGH_BACKLOG_JOBS + 1, is_suspended=True), (), False, id="suspended by a queue"),
    ],
)
def test_backlog_counts_young_jobs_that_lack_pods(jobs, indices, is_high):
    backlog = StartupBacklog(Stores(jobs, build_pods(jobs, indices)), clock=lambda: NOW)
    assert backlog.is_high("team") is is_high


def test_jobs_that_wait_for_a_quota_are_not_counted():
    jobs = [replace(job, started=NOW - YOUNG_SECONDS - 1) for job in build_jobs(HIGH_BACKLOG_JOBS + 1)]
    assert not StartupBacklog(Stores(jobs), clock=lambda: NOW).is_high("team")


@pytest.mark.parametrize(
    ("message", "is_high"),
    [
        pytest.param("Job x: FailedCreate: pods is forbidden: exceeded quota: gpus", False, id="quota"),
        pytest.param('Job x: FailedCreate: failed calling webhook "w": timed out', False, id="webhook"),
        pytest.param("Job x: FailedCreate: etcdserver: request timed out", True, id="control plane"),
    ],
)
def test_jobs_whose_pods_a_namespace_refuses_are_not_counted(message, is_high):
    """A tenant's Jobs otherwise defer the writes of another namespace that starts as many."""
    refused = [replace(job, namespace="tenant") for job in build_jobs(HIGH_BACKLOG_JOBS // 2)]
    jobs = build_jobs(HIGH_BACKLOG_JOBS // 2 + 1) + refused
    obstacles = {job.namespace: {("curate", 1): Obstacle(message=message)} for job in refused}
    backlog = StartupBacklog(Stores(jobs), get_obstacles=lambda key: obstacles.get(key[0], {}), clock=lambda: NOW)
    assert backlog.is_high("team") is is_high


def test_job_that_once_had_all_pods_is_not_counted_again():
    now, jobs = [0.0], build_jobs(HIGH_BACKLOG_JOBS + 1)
    pods = build_pods(jobs, (0, 1))
    backlog = StartupBacklog(Stores(jobs, pods), clock=lambda: NOW, monotonic=lambda: now[0])
    assert not backlog.is_high("team")
    pods.clear()
    now[0] = 1.0
    assert not backlog.is_high("team")


def test_backlog_is_counted_at_most_twice_per_second():
    now, jobs = [0.0], build_jobs(HIGH_BACKLOG_JOBS + 1)
    backlog = StartupBacklog(Stores(jobs), clock=lambda: NOW, monotonic=lambda: now[0])
    assert backlog.is_high("team")
    jobs.clear()
    now[0] = 0.4
    assert backlog.is_high("team")
    now[0] = 0.6
    assert not backlog.is_high("team")


def test_end_of_a_run_is_not_deferred() -> None:
    """Its workers occupy GPUs until the status is written."""
    world = CoreWorld(spec={"activeDeadlineSeconds": 100}, advances_time=False)
    world.run_until_stable()
    run = build_run(status=encode_status(world.status), activeDeadlineSeconds=100)
    seen = observe(world.jobs.values(), world.pods.values())
    at_the_end = reconcile(run, seen, now=world.now + 101, defaults=DEFAULTS)
    assert at_the_end.status is not None
    assert at_the_end.status.is_finished
    assert not at_the_end.may_be_deferred
