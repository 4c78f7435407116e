"""Tests of the Stuck condition: its reason follows from what holds an attempt back."""

from __future__ import annotations

import pytest

from sailvl_operator.api.status import ConditionType, Reason
from sailvl_operator.core.observe import Obstacle
from tests.support.core_world import CoreWorld

MESSAGES = [
    pytest.param('pods "x" is forbidden: exceeded quota: gpus, requested: 8', "QuotaExceeded", id="quota"),
    pytest.param('admission webhook "policy.example.com" denied the request: no', "AdmissionDenied", id="webhook"),
    pytest.param('pods "x" is forbidden: violates PodSecurity "restricted"', "AdmissionDenied", id="pod security"),
    pytest.param("pod x: FailedMount: MountVolume.SetUp failed for volume", "VolumeNotReady", id="volume"),
    pytest.param("jobs.batch is forbidden: User cannot create resource", "Forbidden", id="forbidden"),
    pytest.param("Job.batch is invalid: spec.template", "Rejected", id="other"),
    pytest.param("Job.batch is invalid: it is not owned by this run", "Rejected", id="text of the operator"),
    pytest.param("policy: a Job waits for the scheduler of its team", "Rejected", id="another text of the operator"),
]


@pytest.mark.parametrize(("message", "reason"), MESSAGES)
def test_stuck_reason_follows_from_the_message(message: str, reason: str) -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    world.obstacles["curate", 1] = Obstacle(message=message)
    world.reconcile_once()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason, stuck.message) == ("True", reason, message)
    world.obstacles.clear()
    world.run_until_stable()
    assert not world.status.is_true(ConditionType.STUCK)


def test_refusal_is_reported_while_workers_run() -> None:
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    world.refusals["curate", 1] = Obstacle(message="Service demo exists", reason=Reason.NAME_CONFLICT)
    world.run_until_stable()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "NameConflict")
