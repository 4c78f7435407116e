"""The operator behind an API server that misbehaves: runs end correctly, nothing is counted twice."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.live.api import Api, until
from tests.support.live.api_faults import HAPPENS_TO, every_fault
from tests.support.live.cluster import Cluster
from tests.support.live.proxy import FaultyProxy, Write
from tests.support.live.replicas import Replica, Witness
from tests.support.live.stub_runs import Place, Run, build_image, open_place

pytestmark = pytest.mark.cluster

SEEDS = (1, 2, 3)
FAULTS = replace(every_fault(0.04), gone=0.1, hanging=0.1, cut=0.1, error_event=0.1)
"""There are few watches."""
PATIENT = {"lease_duration_seconds": 10, "lease_renew_deadline_seconds": 8}
"""A slow answer is no reason to give up the lease."""
QUICK_TO_DOUBT = "import sailvl_operator.cluster.client as client; client.WATCH_SILENCE_SECONDS = 6.0"
"""Real servers break a watch's silence once a minute; here none lasts so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """An operator of its own behind a proxy of its own."""

    place: Place
    proxy: FaultyProxy
    operator: Replica

    def describe(self) -> str:
        return f"{self.proxy.dice.describe()}\n{self.operator.last_words()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run, and how it must end whatever happens to requests."""

    name: str
    stub: str
    nodes: int = 1
    stages: int = 1
    end: tuple[tuple[str, int], ...]
    """State and attempt of each stage."""
    restarts: tuple[dict[str, int], ...]
    writes: int
    """At most so many, events apart: twice as many as when nothing goes wrong."""


CASES = (
    Case(name="whole", stub="succeed", nodes=2, stages=2, end=(("Succeeded", 1),) * 2, restarts=({}, {}), writes=26),
    Case(name="crash", stub="crash-once", nodes=2, end=(("Running", 2),), restarts=({"Crash": 1},), writes=26),
    Case(name="wrong", stub="config", end=(("Failed", 1),), restarts=({},), writes=12),
)


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    return build_image(cluster.registry)


@pytest.fixture
def api(cluster: Cluster, resource: None) -> Iterator[Api]:
    with Api(cluster.kubeconfig) as api:
        yield api


def begin(case: Case, place: Place) -> Run:
    return Run(place, case.name, case.stub, nodes=case.nodes, stages=case.stages)


def await_end(case: Case, run: Run, scene: Scene) -> None:
    def has_ended() -> bool:
        assert scene.operator.is_alive(), scene.describe()
        return tuple(run.at(i) for i in range(case.stages)) == case.end

    until(has_ended, told=lambda: f"{run.describe()}\n{scene.describe()}")


@contextmanager
def open_scenes(api: Api, cluster: Cluster, image: str, folder: Path) -> Iterator[list[Scene]]:
    """One a seed."""
    with ExitStack() as stack:
        scenes = []
        for seed in SEEDS:
            place = stack.enter_context(open_place(api, image, prefix="faulty"))
            proxy = FaultyProxy(cluster.kubeconfig, folder, seed=seed, page_size=1, watch_seconds=5)
            stack.enter_context(proxy).dice.faults = FAULTS
            operator = Replica(
                proxy.kubeconfig, [place.namespace], folder, identity=f"seed-{seed}", prelude=QUICK_TO_DOUBT, **PATIENT
            )
            scenes.append(Scene(place=place, proxy=proxy, operator=stack.enter_context(operator)))
        yield scenes


def build_table(scenes: Sequence[Scene]) -> str:
    counts = [scene.proxy.dice.count() for scene in scenes]
    heads = "".join(f"{f'seed {seed}':>10}" for seed in SEEDS)
    rows = [f"{fault:14}" + "".join(f"{count[fault]:10}" for count in counts) for fault in HAPPENS_TO]
    return "\n".join(["", f"{'injected':14}{heads}", *rows, ""])


def find_writes(scene: Scene, case: Case) -> list[Write]:
    """Those that changed something of a run or its children."""
    about = re.compile(rf"(.*=)?{case.name}(-draw-.*)?")
    done = [write for write in scene.proxy.writes if write.status < 300 and not write.path.endswith("/events")]
    return [write for write in done if about.fullmatch(write.about)]


def test_every_fault_at_once(api: Api, cluster: Cluster, image: str, tmp_path: Path, capsys):
    with open_scenes(api, cluster, image, tmp_path) as scenes:
        with Witness(cluster.kubeconfig, [scene.place.namespace for scene in scenes]) as witness:
            runs = [(scene, case, begin(case, scene.place)) for scene in scenes for case in CASES]
            for scene, case, run in runs:
                await_end(case, run, scene)
        with capsys.disabled():
            sys.stdout.write(build_table(scenes))
        for scene, case, run in runs:
            here = scene.place.namespace, case.name
            wanted = {f"draw-{'abc'[i]}": list(range(1, attempt + 1)) for i, (_, attempt) in enumerate(case.end)}
            assert witness.attempts(*here) == wanted, scene.describe()
            assert witness.find_unnoted(*here) == [], scene.describe()
            assert tuple(stage.get("restarts", {}) for stage in run.status["stages"]) == case.restarts
            assert len(writes := find_writes(scene, case)) <= case.writes, "\n".join(
                [*map(str, writes), scene.describe()]
            )
        injected = sum((scene.proxy.dice.count() for scene in scenes), Counter())
        assert set(injected) == set(HAPPENS_TO), "each fault is injected, or this test shows less than it says"
