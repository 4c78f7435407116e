"""Runs end the same with each fault of the API server alone, and when etcd or the API server is killed meanwhile.

The control plane is started for the test; pods run nowhere, because the test simulates the kubelet.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.live.api import wait_until
from tests.support.live.api_faults import REQUEST_KINDS, FaultRates
from tests.support.live.cluster import ROOT
from tests.support.live.crash_points import CrashCase
from tests.support.live.disposable_control_plane import (
    DisposableControlPlane,
    describe_problems,
    open_disposable_control_plane,
)
from tests.support.live.proxy import FaultyProxy
from tests.support.live.replicas import OperatorReplica

pytestmark = pytest.mark.cluster

NONE = "none"
FAULT_RATE, WATCH_FAULT_RATE = 0.3, 0.5
"""Watches are rare, so their rate is higher."""
SHORT_SILENCE = "import sailvl_operator.cluster.client as client; client.WATCH_SILENCE_SECONDS = 3.0"
FLAGS = {
    "lease_duration_seconds": 90,
    "lease_renew_deadline_seconds": 60,
    "failure_settle_seconds": 30,
    "backoff_seconds": 0.2,
}
"""The lease and the settling time outlast a restart of the API server: the same process must continue, and it must not
choose a cause before the simulated kubelet could report the second pod."""
MAX_WRITES = 42
"""Writes without events: one and a half times those of an undisturbed run."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DisposableControlPlane]:
    built = subprocess.run([ROOT / "hack/cluster/build.sh"], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"no control plane: {built.stderr.strip()[-200:]}")
    with open_disposable_control_plane(Path(built.stdout.strip()), tmp_path_factory.mktemp("plane")) as plane:
        yield plane


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRow:
    """A row of the printed table of faults."""

    fault: str
    injected: int
    writes: int
    """Executed writes without events and leases."""
    problems: str

    def __str__(self) -> str:
        return f"{self.fault:14} {self.injected:8} {self.writes:6}  {self.problems or 'same'}"


def build_row(fault: str, case: CrashCase, undisturbed: CrashCase, proxy: FaultyProxy) -> FaultRow:
    writes = [w for w in proxy.writes if f"/{case.namespace}/" in w.path and w.status < 300]
    return FaultRow(
        fault=fault,
        injected=sum(injected.namespace == case.namespace for injected in proxy.schedule.injected),
        writes=sum(not write.path.endswith("/events") and "/leases" not in write.path for write in writes),
        problems=describe_problems(case, undisturbed),
    )


def build_case(name: str) -> CrashCase:
    return CrashCase(namespace=f"{name.replace('_', '-')}-{uuid.uuid4().hex[:6]}")


def build_rates(fault: str) -> FaultRates:
    if fault == NONE:
        return FaultRates()
    is_rare = not {"write", "list"} & set(REQUEST_KINDS[fault].split())
    return FaultRates(**{fault: WATCH_FAULT_RATE if is_rare else FAULT_RATE})


def test_each_api_fault_alone_changes_no_result(plane: DisposableControlPlane, tmp_path: Path, capsys):
    """Run one operator for all namespaces, and inject another fault in each of them."""
    cases = {fault: build_case(fault) for fault in (NONE, *REQUEST_KINDS)}
    with ExitStack() as stack:
        stack.enter_context(plane.watch_cases(list(cases.values())))
        proxy = stack.enter_context(FaultyProxy(str(plane.kubeconfig), tmp_path, page_size=2, watch_seconds=4))
        namespaces = [case.namespace for case in cases.values()]
        operator = OperatorReplica(proxy.kubeconfig, namespaces, tmp_path, prelude=SHORT_SILENCE, **FLAGS)
        stack.enter_context(operator).wait_until_leading()
        for fault, case in cases.items():
            proxy.schedule.rates_in[case.namespace] = build_rates(fault)
            plane.create_run(case)
        wait_until(
            lambda: all(case.has_finished.is_set() for case in cases.values()), 100, describe=operator.read_log_tail
        )
        rows = [build_row(fault, case, cases[NONE], proxy) for fault, case in cases.items()]
    with capsys.disabled():
        sys.stdout.write("\n".join([f"\n{'fault':14} {'injected':>8} {'writes':>6}  end", *map(str, rows), ""]))
    assert [row for row in rows if row.problems or row.writes > MAX_WRITES] == []
    assert [row for row in rows if not row.injected] == [rows[0]], "a fault was never injected"


@pytest.mark.parametrize("program", ["etcd", "kube-apiserver"])
def test_killed_control_plane_process_changes_no_result(plane: DisposableControlPlane, tmp_path: Path, program: str):
    """Kill it twice during the runs; the same operator process must continue."""
    cases = [build_case("restart") for _ in range(4)]
    with plane.watch_cases(cases):
        namespaces = [case.namespace for case in cases]
        with OperatorReplica(plane.kubeconfig, namespaces, tmp_path, prelude=SHORT_SILENCE, **FLAGS) as operator:
            operator.wait_until_leading()
            for case in cases:
                plane.create_run(case)
            for stages in (1, 2):
                wait_until(lambda: count_started(cases[0]) >= stages, describe=operator.read_log_tail)  # noqa: B023  # evaluated at once
                plane.kill(program, seconds=4.0)
            wait_until(lambda: all(case.has_finished.is_set() for case in cases), 60, describe=operator.read_log_tail)
            assert operator.is_alive()
    assert [describe_problems(case, cases[0]) for case in cases] == [""] * len(cases)


def count_started(case: CrashCase) -> int:
    return sum(stage.attempt > 0 for stage in case.status.stages)
