"""Tests of the Stuck condition: its reason follows from what holds an attempt back."""

from __future__ import annotations

import pytest

from sailvl_operator.api.status import ConditionType
from tests.support.core_world import CoreWorld

MESSAGES = [
    pytest.param('pods "x" is forbidden: exceeded quota: gpus, requested: 8', "QuotaExceeded", id="quota"),
    pytest.param('admission webhook "policy.example.com" denied the request: no', "AdmissionDenied", id="webhook"),
    pytest.param('pods "x" is forbidden: violates PodSecurity "restricted"', "AdmissionDenied", id="pod security"),
    pytest.param("pod x: FailedMount: MountVolume.SetUp failed for volume", "VolumeNotReady", id="volume"),
    pytest.param(
        "Job demo-a-1 exists and is not owned by this run; delete it or rename the run", "NameConflict", id="name"
    ),
    pytest.param("jobs.batch is forbidden: User cannot create resource", "Forbidden", id="forbidden"),
    pytest.param("Job.batch is invalid: spec.template", "Rejected", id="other"),
]


@pytest.mark.parametrize(("message", "reason"), MESSAGES)
def test_stuck_reason_follows_from_the_message(message: str, reason: str) -> None:
    world = CoreWorld(advances_time=False)
    world.reconcile_once()
    world.wait_reasons["curate", 1] = message
    world.reconcile_once()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason, stuck.message) == ("True", reason, message)
    world.wait_reasons.clear()
    world.run_until_stable()
    assert not world.status.is_true(ConditionType.STUCK)


def test_refusal_is_reported_while_workers_run() -> None:
    world = CoreWorld(advances_time=False)
    world.run_until_stable()
    world.refusals["curate", 1] = "Service demo exists and is not owned by this run; delete it or rename the run"
    world.run_until_stable()
    stuck = world.status.condition(ConditionType.STUCK)
    assert stuck is not None
    assert (stuck.status, stuck.reason) == ("True", "NameConflict")
