"""A control plane of the test's own: each fault of its API alone, and its parts killed in the middle of runs.

The pods run nowhere: the test plays the kubelet. However it is reached, a whole run has the same end.
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

from tests.support.live.api import until
from tests.support.live.api_faults import HAPPENS_TO, Faults
from tests.support.live.crash_points import Case
from tests.support.live.disposable_control_plane import ROOT, Plane, judge, open_plane
from tests.support.live.proxy import FaultyProxy
from tests.support.live.replicas import Replica

pytestmark = pytest.mark.cluster

NONE = "none"
CHANCE, CHANCE_OF_WATCHES = 0.3, 0.5
"""There are few watches."""
QUICK_TO_DOUBT = "import sailvl_operator.cluster.client as client; client.WATCH_SILENCE_SECONDS = 3.0"
FLAGS = {
    "lease_duration_seconds": 90,
    "lease_renew_deadline_seconds": 60,
    "failure_settle_seconds": 30,
    "backoff_seconds": 0.2,
}
"""A server that takes long to come back is no reason to give up the lease: the same process has to go on. Nor is it one
to judge by the first pod alone: the kubelet can't tell of the second one's end meanwhile."""
WRITES = 42
"""At most, events apart: half as many again as when nothing goes wrong."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    built = subprocess.run([ROOT / "hack/cluster/build.sh"], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"no control plane: {built.stderr.strip()[-200:]}")
    with open_plane(Path(built.stdout.strip()), tmp_path_factory.mktemp("plane")) as plane:
        yield plane


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Of the table of faults."""

    fault: str
    injected: int
    writes: int
    """That were carried out, events and the lease apart."""
    wrong: str

    def __str__(self) -> str:
        return f"{self.fault:14} {self.injected:8} {self.writes:6}  {self.wrong or 'as without'}"


def build_row(fault: str, case: Case, undisturbed: Case, proxy: FaultyProxy) -> Row:
    writes = [w for w in proxy.writes if f"/{case.namespace}/" in w.path and w.status < 300]
    return Row(
        fault=fault,
        injected=sum(injection.namespace == case.namespace for injection in proxy.dice.injected),
        writes=sum(not write.path.endswith("/events") and "/leases" not in write.path for write in writes),
        wrong=judge(case, undisturbed),
    )


def build_case(name: str) -> Case:
    return Case(namespace=f"{name.replace('_', '-')}-{uuid.uuid4().hex[:6]}")


def build_faults(fault: str) -> Faults:
    if fault == NONE:
        return Faults()
    is_rare = not {"write", "list"} & set(HAPPENS_TO[fault].split())
    return Faults(**{fault: CHANCE_OF_WATCHES if is_rare else CHANCE})


def test_each_fault_alone(plane: Plane, tmp_path: Path, capsys):
    """One operator; in each namespace another fault happens to its requests."""
    cases = {fault: build_case(fault) for fault in (NONE, *HAPPENS_TO)}
    with ExitStack() as stack:
        stack.enter_context(plane.watching(list(cases.values())))
        proxy = stack.enter_context(FaultyProxy(str(plane.kubeconfig), tmp_path, page_size=2, watch_seconds=4))
        namespaces = [case.namespace for case in cases.values()]
        operator = Replica(proxy.kubeconfig, namespaces, tmp_path, prelude=QUICK_TO_DOUBT, **FLAGS)
        stack.enter_context(operator).until_leading()
        for fault, case in cases.items():
            proxy.dice.faults_in[case.namespace] = build_faults(fault)
            plane.begin(case)
        until(lambda: all(case.ended.is_set() for case in cases.values()), 100, told=operator.last_words)
        rows = [build_row(fault, case, cases[NONE], proxy) for fault, case in cases.items()]
    with capsys.disabled():
        sys.stdout.write("\n".join([f"\n{'fault':14} {'injected':>8} {'writes':>6}  end", *map(str, rows), ""]))
    assert [row for row in rows if row.wrong or row.writes > WRITES] == []
    assert [row for row in rows if not row.injected] == [rows[0]], "a fault that never happened shows nothing"


@pytest.mark.parametrize("program", ["etcd", "kube-apiserver"])
def test_a_part_is_killed_and_comes_back(plane: Plane, tmp_path: Path, program: str):
    """Twice, in the middle of runs; the same operator goes on."""
    cases = [build_case("restart") for _ in range(4)]
    with plane.watching(cases):
        namespaces = [case.namespace for case in cases]
        with Replica(plane.kubeconfig, namespaces, tmp_path, prelude=QUICK_TO_DOUBT, **FLAGS) as operator:
            operator.until_leading()
            for case in cases:
                plane.begin(case)
            for stages in (1, 2):
                until(lambda: count_begun(cases[0]) >= stages, told=operator.last_words)  # noqa: B023  # at once
                plane.kill(program, seconds=4.0)
            until(lambda: all(case.ended.is_set() for case in cases), 60, told=operator.last_words)
            assert operator.is_alive()
    assert [judge(case, cases[0]) for case in cases] == [""] * len(cases)


def count_begun(case: Case) -> int:
    return sum(stage.attempt > 0 for stage in case.status.stages)
