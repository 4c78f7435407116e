"""Where whole workers listen, and what processes that don't belong to an attempt can do to it over the network."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from sailvl_trainer.contract import Env
from tests.support.pickle_attack import C10D_RENDEZVOUS_KEY, build_pickle_attack
from tests.support.sockets import find_descendants, find_listeners
from tests.support.worker_processes import WorkerProcesses

pytestmark = pytest.mark.slow
Build = Callable[..., WorkerProcesses]
IDLE_CONNECTIONS = 1_000


def find_all_listeners(workers: WorkerProcesses) -> set[tuple[str, int]]:
    """Return where the workers and their ranks listen."""
    return find_listeners([pid for process in workers.processes.values() for pid in find_descendants(process.pid)])


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_only_the_http_server_listens_beyond_loopback(nodes: int, ranks: int, build_workers: Build) -> None:
    workers = build_workers("step_until_stopped", nodes=nodes, environment={Env.PROCESSES_PER_NODE: ranks})
    workers.start_all()
    workers.wait_for_step(2)
    listeners = find_all_listeners(workers)
    http = {workers.metrics_port + index for index in range(nodes)}
    assert {port for address, port in listeners if not ip_address(address).is_loopback} == http
    assert (workers.rendezvous_port in {port for _, port in listeners}) is (nodes > 1)
    for process in workers.processes.values():
        process.terminate()
    assert [ended.exit_code for ended in workers.wait_for_all()] == [75] * nodes, workers.read_logs()


def open_client(workers: WorkerProcesses) -> TCPStore:
    """Connect to the store of worker 0, as every process that reaches its port can."""
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", workers.rendezvous_port), timeout=1):
            break
        assert workers.processes[0].poll() is None, workers.read_log()
    return TCPStore("127.0.0.1", workers.rendezvous_port, is_master=False, timeout=timedelta(seconds=20))


def connect(port: int) -> socket.socket:
    """Connect to a port of this machine without blocking the own port for servers, such as a worker's."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.bind(("127.0.0.1", 0))
    connection.connect(("127.0.0.1", port))
    return connection


def test_attempt_succeeds_despite_foreign_keys_junk_and_idle_connections(build_workers: Build, tmp_path: Path) -> None:
    workers = build_workers("succeed", nodes=2)
    workers.start(0)
    data = build_pickle_attack(tmp_path / "marker")
    client = open_client(workers)
    client.set(C10D_RENDEZVOUS_KEY, base64.b64encode(data))
    for key in ("default_pg/0//cpu//0/0", "1/joined", "closed"):
        client.set(key, data)
    with ExitStack() as opened:
        for number in range(IDLE_CONNECTIONS):
            connection = opened.enter_context(connect(workers.rendezvous_port))
            if number % 10 == 0:
                connection.sendall(os.urandom(200))
        workers.start(1)
        assert [ended.exit_code for ended in workers.wait_for_all()] == [0, 0], workers.read_logs()
    assert not (tmp_path / "marker").exists()


def test_client_that_overwrites_all_keys_can_end_an_attempt_but_runs_no_code(
    build_workers: Build, tmp_path: Path
) -> None:
    """The store lists its keys to every client, so that the secret doesn't keep this one away."""
    workers = build_workers("step_until_stopped", nodes=2, environment={Env.IN_PLACE_RESTARTS: 1})
    workers.start_all()
    workers.wait_for_step(2)
    data = build_pickle_attack(tmp_path / "marker")
    client = open_client(workers)
    for key in client.list_keys():
        client.set(key, data)
    client.set(C10D_RENDEZVOUS_KEY, base64.b64encode(data))
    client.set("1a2b/2/joined", data)  # all workers restart their ranks, and try to join this round
    assert [ended.exit_code for ended in workers.wait_for_all()] == [76, 76], workers.read_logs()
    assert "which hosts the store at localhost" in workers.read_logs()
    assert not (tmp_path / "marker").exists()
