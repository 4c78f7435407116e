"""Runs end correctly, and no attempt is counted twice, behind an API server with all faults at once."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.live.api import ClusterApi, wait_until
from tests.support.live.api_faults import REQUEST_KINDS, build_uniform_rates
from tests.support.live.cluster import Cluster
from tests.support.live.proxy import FaultyProxy, ForwardedWrite
from tests.support.live.replicas import AttemptRecorder, OperatorReplica
from tests.support.live.stub_runs import StubRun, Workspace, build_stub_image, open_workspace

pytestmark = pytest.mark.cluster

SEEDS = (1, 2, 3)
FAULTS = replace(build_uniform_rates(0.04), gone=0.1, hanging=0.1, cut=0.1, error_event=0.1)
"""Watches are rare, so their rates are higher."""
LONG_LEASE = {"lease_duration_seconds": 10, "lease_renew_deadline_seconds": 8}
"""Slow answers must not cost the operator its lease."""
SHORT_SILENCE = "import sailvl_operator.cluster.client as client; client.WATCH_SILENCE_SECONDS = 6.0"
"""Real servers send a bookmark once a minute; the watches of this test end earlier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorBehindProxy:
    """An operator, its proxy and its workspace."""

    workspace: Workspace
    proxy: FaultyProxy
    operator: OperatorReplica

    def describe(self) -> str:
        return f"{self.proxy.schedule.describe()}\n{self.operator.read_log_tail()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultyRunCase:
    """A run and its expected end."""

    name: str
    stub: str
    nodes: int = 1
    stages: int = 1
    end: tuple[tuple[str, int], ...]
    """State and attempt of each stage."""
    restarts: tuple[dict[str, int], ...]
    max_writes: int
    """Writes without events: twice those of an undisturbed run."""


CASES = (
    FaultyRunCase(
        name="whole", stub="succeed", nodes=2, stages=2, end=(("Succeeded", 1),) * 2, restarts=({}, {}), max_writes=26
    ),
    FaultyRunCase(
        name="crash", stub="crash-once", nodes=2, end=(("Running", 2),), restarts=({"Crash": 1},), max_writes=26
    ),
    FaultyRunCase(name="wrong", stub="config", end=(("Failed", 1),), restarts=({},), max_writes=12),
)


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    return build_stub_image(cluster.registry)


@pytest.fixture
def api(cluster: Cluster, resource: None) -> Iterator[ClusterApi]:
    with ClusterApi(cluster.kubeconfig) as api:
        yield api


def create_run(case: FaultyRunCase, workspace: Workspace) -> StubRun:
    return StubRun(workspace, case.name, case.stub, nodes=case.nodes, stages=case.stages)


def wait_for_end(case: FaultyRunCase, run: StubRun, setup: OperatorBehindProxy) -> None:
    def has_ended() -> bool:
        assert setup.operator.is_alive(), setup.describe()
        return tuple(run.stage_state(i) for i in range(case.stages)) == case.end

    wait_until(has_ended, describe=lambda: f"{run.describe()}\n{setup.describe()}")


@contextmanager
def open_operators(api: ClusterApi, cluster: Cluster, image: str, folder: Path) -> Iterator[list[OperatorBehindProxy]]:
    """Start an operator behind a proxy for each seed."""
    with ExitStack() as stack:
        operators = []
        for seed in SEEDS:
            workspace = stack.enter_context(open_workspace(api, image, prefix="faulty"))
            proxy = FaultyProxy(cluster.kubeconfig, folder, seed=seed, page_size=1, watch_seconds=5)
            stack.enter_context(proxy).schedule.rates = FAULTS
            operator = OperatorReplica(
                proxy.kubeconfig,
                [workspace.namespace],
                folder,
                identity=f"seed-{seed}",
                prelude=SHORT_SILENCE,
                **LONG_LEASE,
            )
            operators.append(
                OperatorBehindProxy(workspace=workspace, proxy=proxy, operator=stack.enter_context(operator))
            )
        yield operators


def build_table(operators: Sequence[OperatorBehindProxy]) -> str:
    counts = [setup.proxy.schedule.count() for setup in operators]
    heads = "".join(f"{f'seed {seed}':>10}" for seed in SEEDS)
    rows = [f"{fault:14}" + "".join(f"{count[fault]:10}" for count in counts) for fault in REQUEST_KINDS]
    return "\n".join(["", f"{'injected':14}{heads}", *rows, ""])


def find_writes(setup: OperatorBehindProxy, case: FaultyRunCase) -> list[ForwardedWrite]:
    """Return the writes that changed a run or its objects."""
    subject = re.compile(rf"(.*=)?{case.name}(-draw-.*)?")
    done = [write for write in setup.proxy.writes if write.status < 300 and not write.path.endswith("/events")]
    return [write for write in done if subject.fullmatch(write.subject)]


def test_all_api_faults_at_once_change_no_result(api: ClusterApi, cluster: Cluster, image: str, tmp_path: Path, capsys):
    with open_operators(api, cluster, image, tmp_path) as operators:
        with AttemptRecorder(cluster.kubeconfig, [setup.workspace.namespace for setup in operators]) as recorder:
            runs = [(setup, case, create_run(case, setup.workspace)) for setup in operators for case in CASES]
            for setup, case, run in runs:
                wait_for_end(case, run, setup)
        with capsys.disabled():
            sys.stdout.write(build_table(operators))
        for setup, case, run in runs:
            key = setup.workspace.namespace, case.name
            wanted = {f"draw-{'abc'[i]}": list(range(1, attempt + 1)) for i, (_, attempt) in enumerate(case.end)}
            assert recorder.list_attempts(*key) == wanted, setup.describe()
            assert recorder.list_unrecorded_attempts(*key) == [], setup.describe()
            assert tuple(stage.get("restarts", {}) for stage in run.status["stages"]) == case.restarts
            assert len(writes := find_writes(setup, case)) <= case.max_writes, "\n".join(
                [*map(str, writes), setup.describe()]
            )
        injected = sum((setup.proxy.schedule.count() for setup in operators), Counter())
        assert set(injected) == set(REQUEST_KINDS), "a fault was never injected"
