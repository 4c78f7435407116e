"""The rendezvous of an attempt's workers: rounds, restarts in place, where it listens, and foreign clients."""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousInfo,
    RendezvousStateError,
)

from sailvl_trainer.rank.settings import Settings
from sailvl_trainer.rank.store import StoreAddress
from sailvl_trainer.worker import rendezvous
from sailvl_trainer.worker.rendezvous import FixedRendezvous, build_rendezvous
from tests.support.builders.worker import free_port
from tests.support.pickle_attack import C10D_RENDEZVOUS_KEY, build_pickle_attack
from tests.support.sockets import find_listeners

SETTINGS = Settings(stage_file=Path("stage.json"), nodes=2, rendezvous_secret="1a2b", scratch=Path("/scratch"))
WAIT_SECONDS = 20


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT_SECONDS", WAIT_SECONDS)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def build_members(nodes: int = 2, store: Store | None = None) -> list[FixedRendezvous]:
    """Return the rendezvous of all workers of an attempt, on one store."""
    store = store or HashStore()
    return [FixedRendezvous(replace(SETTINGS, nodes=nodes, node_rank=index), store, "host") for index in range(nodes)]


def join_all(pool: ThreadPoolExecutor, members: list[FixedRendezvous]) -> list[RendezvousInfo]:
    """Have all members join the next round, the last one first."""
    joins: list[Future[RendezvousInfo]] = [pool.submit(member.next_rendezvous) for member in reversed(members)]
    return [join.result(WAIT_SECONDS) for join in reversed(joins)]


def test_workers_keep_their_indexes_in_every_round(pool: ThreadPoolExecutor) -> None:
    members = build_members(nodes=3)
    for _ in range(2):
        assert [(info.rank, info.world_size) for info in join_all(pool, members)] == [(0, 3), (1, 3), (2, 3)]


def test_round_is_not_complete_without_the_last_worker(pool: ThreadPoolExecutor) -> None:
    first, last = build_members()
    join = pool.submit(first.next_rendezvous)
    threading.Event().wait(0.1)
    assert not join.done()
    last.next_rendezvous()
    assert join.result(WAIT_SECONDS).rank == 0


def test_worker_that_rejoins_is_waited_for_by_the_others(pool: ThreadPoolExecutor) -> None:
    first, last = members = build_members()
    join_all(pool, members)
    assert [member.num_nodes_waiting() for member in members] == [0, 0]
    rejoin = pool.submit(last.next_rendezvous)
    while not first.num_nodes_waiting():
        assert not rejoin.done()
    first.next_rendezvous()
    rejoin.result(WAIT_SECONDS)
    assert [member.num_nodes_waiting() for member in members] == [0, 0]


def test_agents_of_two_rounds_share_no_keys(pool: ThreadPoolExecutor) -> None:
    members = build_members()
    join_all(pool, members)[0].store.set("exited", "1")
    assert not join_all(pool, members)[0].store.check(["exited"])


def test_end_of_a_worker_ends_the_wait_of_the_others(pool: ThreadPoolExecutor) -> None:
    first, last = build_members()
    join = pool.submit(first.next_rendezvous)
    assert last.shutdown()
    with pytest.raises(RendezvousClosedError, match="another worker has ended"):
        join.result(WAIT_SECONDS)


def test_second_process_with_the_same_index_is_refused(pool: ThreadPoolExecutor) -> None:
    store = HashStore()
    [one, _], [other, _] = build_members(store=store), build_members(store=store)
    join = pool.submit(one.next_rendezvous)
    while not store.check(["1a2b/1/joined"]):
        assert not join.done()
    with pytest.raises(RendezvousStateError, match=r"another process has joined as worker 0; .*NODE_RANK"):
        other.next_rendezvous()
    one.set_closed()


def test_workers_with_different_numbers_of_ranks_are_refused(pool: ThreadPoolExecutor) -> None:
    store = HashStore()
    one = FixedRendezvous(SETTINGS, store, "host")
    other = FixedRendezvous(replace(SETTINGS, node_rank=1, processes_per_node=4), store, "host")
    join = pool.submit(one.next_rendezvous)
    while not store.check(["1a2b/1/joined"]):
        assert not join.done()
    with pytest.raises(RendezvousStateError, match="worker 1 starts 4 ranks, but another one '1'"):
        other.next_rendezvous()
    one.set_closed()


def test_ranks_of_each_start_have_a_store_of_their_own(pool: ThreadPoolExecutor) -> None:
    [single] = build_members(nodes=1)
    single.next_rendezvous()
    assert single.rank_store == StoreAddress(path="/scratch/store-1")
    single.next_rendezvous()
    assert single.rank_store == StoreAddress(path="/scratch/store-2")
    members = build_members()
    join_all(pool, members)
    assert members[1].rank_store == StoreAddress(host="host", port=29500, prefix="1a2b/1/ranks")


def build_settings(**fields: object) -> Settings:
    return replace(SETTINGS, rendezvous_port=free_port(), **fields)  # type: ignore[arg-type]  # fields of Settings


def test_single_worker_listens_nowhere() -> None:
    before = find_listeners([os.getpid()])
    built = build_rendezvous(build_settings(nodes=1))
    assert find_listeners([os.getpid()]) == before
    assert built.next_rendezvous().world_size == 1


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        pytest.param({"rendezvous_host": "demo-0.demo", "pod_ip": "127.0.0.2"}, "127.0.0.2", id="pod's address"),
        pytest.param({"rendezvous_host": "localhost"}, "127.0.0.1", id="loopback for workers of one machine"),
    ],
)
def test_worker_0_listens_on_one_address_only(fields: dict[str, str], address: str) -> None:
    settings = build_settings(**fields)
    before = find_listeners([os.getpid()])
    built = build_rendezvous(settings)
    assert find_listeners([os.getpid()]) - before == {(address, settings.rendezvous_port)}
    assert not built.is_closed()


def test_port_in_use_is_named() -> None:
    settings = build_settings()
    with (
        socket.create_server(("127.0.0.1", settings.rendezvous_port)),
        pytest.raises(RendezvousConnectionError, match=f"can't listen on port {settings.rendezvous_port} of 127"),
    ):
        build_rendezvous(settings)


@pytest.fixture
def served() -> tuple[list[FixedRendezvous], TCPStore]:
    """Return both members of an attempt on a store over loopback, and a foreign client of the store."""
    settings = build_settings()
    first = build_rendezvous(settings)
    second = build_rendezvous(replace(settings, node_rank=1))
    client = TCPStore("127.0.0.1", settings.rendezvous_port, is_master=False, timeout=timedelta(seconds=WAIT_SECONDS))
    return [first, second], client


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param(["worker/1"], "another process has joined as worker 1", id="index of a worker"),
        pytest.param(["ranks_per_worker"], "worker 1 starts 1 ranks, but another one", id="number of ranks"),
        pytest.param(["joined"], "lost the connection to worker 0, which hosts the store at localhost:", id="counter"),
    ],
)
def test_foreign_client_that_writes_into_the_keys_of_a_round_ends_it(
    served: tuple[list[FixedRendezvous], TCPStore],
    pool: ThreadPoolExecutor,
    tmp_path: Path,
    keys: list[str],
    message: str,
) -> None:
    """No code runs, and the worker that finds the junk ends the wait of the others."""
    members, client = served
    data = build_pickle_attack(tmp_path / "marker")
    client.set(C10D_RENDEZVOUS_KEY, base64.b64encode(data))
    join = pool.submit(members[0].next_rendezvous)
    while not client.check(["1a2b/1/joined"]):
        assert not join.done()
    for key in keys:
        client.set(f"1a2b/1/{key}", data)
    with pytest.raises(RendezvousError, match=message):
        members[1].next_rendezvous()
    members[0].set_closed()
    with pytest.raises(RendezvousClosedError):
        join.result(WAIT_SECONDS)
    assert not (tmp_path / "marker").exists()


def test_junk_and_idle_connections_do_not_disturb_the_rendezvous(
    served: tuple[list[FixedRendezvous], TCPStore], pool: ThreadPoolExecutor
) -> None:
    members, client = served
    connections = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(200)]
    for number, connection in enumerate(connections[:100]):
        connection.sendall(bytes([number]) * 1000 + b"\xff" * 1000)
    assert [info.rank for info in join_all(pool, members)] == [0, 1]
    for connection in connections:
        connection.close()
