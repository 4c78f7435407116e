"""Helpers of the cluster tests keep to the current API and flags; checked without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.api.validation import validate
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.options import OPTIONS
from tests.cluster.test_control_plane_faults import FLAGS
from tests.cluster.test_faulty_api import LONG_LEASE
from tests.faults.runs.spec import build_run
from tests.support.live.api import Object, build_object
from tests.support.live.blocked_starts import BLOCKED_STARTS, BlockedStart, create_blocked_run
from tests.support.live.crash_points import RUN, SPEC
from tests.support.live.replicas import FAST_FLAGS
from tests.support.live.stub_runs import Workspace


class RecordingApi:
    """Takes the place of a ClusterApi and keeps the objects that are created."""

    def __init__(self) -> None:
        self.created: list[Object] = []

    def create(self, resource: Resource, body: Object) -> Object:
        self.created.append(body)
        return {"metadata": {"uid": "x"}}


@pytest.mark.parametrize("flags", [FAST_FLAGS, FLAGS, LONG_LEASE], ids=["fast flags", "outages", "long lease"])
def test_operator_has_flags_of_replicas(flags: dict[str, Any]) -> None:
    known = {option.flag for option in OPTIONS}
    assert {f"--{name.replace('_', '-')}" for name in flags} <= known


@pytest.mark.parametrize("blocked", BLOCKED_STARTS, ids=lambda blocked: blocked.name)
def test_run_of_blocked_start_is_valid(blocked: BlockedStart, tmp_path: Path) -> None:
    api = RecordingApi()
    workspace = Workspace(api=api, namespace="stub", storage=tmp_path, image="stub:1")  # type: ignore[arg-type]
    create_blocked_run(blocked, workspace)
    [run] = api.created
    assert validate(run) == []


def test_run_of_crash_points_is_valid() -> None:
    assert validate(build_object("SailVLRun", RUN, "sailvl.dev/v1alpha1", namespace="crash", spec=SPEC)) == []


def test_run_of_fault_tests_is_valid() -> None:
    assert validate(build_run("faults", "team", claim="storage", policy={"stallTimeoutSeconds": 30})) == []
