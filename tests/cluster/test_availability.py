"""Two replicas and a lease: whatever happens to the leader, another goes on, and never do two write."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from sailvl_operator.cluster.resources import PODS
from tests.support.live.api import Api, until
from tests.support.live.cluster import Cluster
from tests.support.live.proxy import FaultyProxy
from tests.support.live.replicas import QUICK, Replica, Witness
from tests.support.live.stub_runs import Place, Run, build_image, open_place

pytestmark = pytest.mark.cluster

SLACK = 4.0
"""Seconds that a busy machine may need."""
DURATION, DEADLINE, INTERVAL = (
    float(str(QUICK[name]))
    for name in ("lease-duration-seconds", "lease-renew-deadline-seconds", "lease-renew-interval-seconds")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A replica behind a proxy of its own."""

    replica: Replica
    proxy: FaultyProxy


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    place: Place
    witness: Witness
    leader: Member
    standby: Member

    def fail_a_pod(self, run: Run) -> None:
        """From outside, while the first attempt runs."""
        [pod] = [p for p in run.children(PODS) if p["metadata"]["name"].startswith(f"{run.name}-draw-a-1-0")]
        self.place.api.delete(PODS, pod["metadata"]["name"], self.place.namespace)

    def judge(self, run: Run, attempts: int) -> None:
        """The run goes on with this attempt, by the standby."""
        self.standby.replica.until_leading(DURATION + INTERVAL + SLACK)
        run.until_at("Running", attempts)
        assert self.witness.attempts(self.place.namespace, run.name) == {"draw-a": list(range(1, attempts + 1))}
        assert self.witness.find_unnoted(self.place.namespace, run.name) == []


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    return build_image(cluster.registry)


@pytest.fixture(scope="module")
def place(cluster: Cluster, resource: None, image: str) -> Iterator[Place]:
    with Api(cluster.kubeconfig) as api, open_place(api, image, prefix="replicas") as place:
        yield place


@pytest.fixture(scope="module")
def members(cluster: Cluster, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """Both for all tests; one that has ended is started again."""
    folder = tmp_path_factory.mktemp("members")
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultyProxy(cluster.kubeconfig, folder, seed=seed)) for seed in (1, 2)]
        yield [
            Member(
                replica=stack.enter_context(Replica(p.kubeconfig, [place.namespace], folder, identity=name)), proxy=p
            )
            for name, p in zip(("first", "second"), proxies, strict=True)
        ]


@pytest.fixture
def pair(cluster: Cluster, place: Place, members: list[Member]) -> Iterator[Pair]:
    for member in members:
        if not member.replica.is_alive():
            member.replica.start()
    for member in members:
        member.replica.until_ready()
    until(lambda: any(member.replica.is_leading() for member in members))
    standby, leader = sorted(members, key=lambda member: member.replica.is_leading())
    with Witness(cluster.kubeconfig, [place.namespace]) as witness:
        yield Pair(place=place, witness=witness, leader=leader, standby=standby)


def test_the_leader_is_killed(pair: Pair):
    run = Run(pair.place, "killed", nodes=2)
    run.until_at("Running")
    pair.leader.replica.end(signal.SIGKILL)
    pair.fail_a_pod(run)
    pair.judge(run, 2)


def test_the_leader_is_told_to_end(pair: Pair):
    run = Run(pair.place, "told", nodes=2)
    run.until_at("Running")
    told = time.monotonic()
    pair.leader.replica.process.send_signal(signal.SIGTERM)
    pair.standby.replica.until_leading()
    assert time.monotonic() - told < DURATION, "it gives the lease back"
    assert pair.leader.replica.process.wait(10) == 0
    pair.judge(run, 1)


def test_the_leader_is_cut_off(pair: Pair):
    run = Run(pair.place, "cut-off", nodes=2)
    run.until_at("Running")
    pair.leader.proxy.cut(silent=True)
    written = len(pair.leader.proxy.writes)
    pair.fail_a_pod(run)
    assert pair.leader.replica.process.wait(DEADLINE + SLACK) == 1
    pair.judge(run, 2)
    pair.leader.proxy.heal()
    time.sleep(1.0)
    assert pair.leader.proxy.writes[written:] == []


def test_the_leader_stands_still_and_wakes(pair: Pair):
    run = Run(pair.place, "still", nodes=2)
    run.until_at("Running")
    pair.leader.replica.process.send_signal(signal.SIGSTOP)
    written = len(pair.leader.proxy.writes)
    pair.fail_a_pod(run)
    pair.judge(run, 2)
    pair.leader.replica.process.send_signal(signal.SIGCONT)
    assert pair.leader.replica.process.wait(SLACK) == 1
    assert pair.leader.proxy.writes[written:] == []
    pair.judge(run, 2)
