"""The worker's HTTP server, also while clients hold connections open."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sailvl_trainer.contract import Progress
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.worker import connections
from sailvl_trainer.worker.connections import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS
from sailvl_trainer.worker.server import WorkerServer, start_server


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    scratch = Scratch(tmp_path / "scratch")
    scratch.prepare()
    return scratch


@pytest.fixture
def server(scratch: Scratch) -> Iterator[WorkerServer]:
    server = start_server(0, scratch)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def read(server: WorkerServer, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=5) as answer:
        data: bytes = answer.read()
        return data


def test_server_serves_progress_and_refuses_a_port_in_use(server: WorkerServer, scratch: Scratch) -> None:
    with pytest.raises(urllib.request.HTTPError) as missing:
        read(server, "/progress")
    with missing.value as answer:
        assert answer.code == 404
    scratch.progress_file.write_bytes(encode(Progress(attempt=2, phase="running")))
    assert decode(Progress, read(server, "/progress")).attempt == 2
    with pytest.raises(ConfigError, match=f"port {server.server_port} for metrics is in use"):
        start_server(server.server_port, scratch)


def hold_open(server: WorkerServer, stack: ExitStack, address: str, *, count: int) -> list[socket.socket]:
    """Open connections from an address of loopback that begin a request and never end it."""
    opened = []
    for _ in range(count):
        connection = stack.enter_context(
            socket.create_connection(("127.0.0.1", server.server_port), source_address=(address, 0))
        )
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        opened.append(connection)
    return opened


def count_threads() -> int:
    return sum("process_request" in thread.name for thread in threading.enumerate())


def wait_until(server: WorkerServer, *, served: int) -> None:
    end = time.monotonic() + 10
    while len(server.connections) > served or count_threads() > served:
        assert time.monotonic() < end, (len(server.connections), count_threads())
        time.sleep(0.01)


def test_client_that_holds_connections_open_keeps_few_of_them_and_others_are_answered(server: WorkerServer) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            hold_open(server, stack, "127.0.0.2", count=20)
            assert read(server, "/healthz") == b"ok\n"
        wait_until(server, served=MAX_CONNECTIONS_PER_ADDRESS)


def test_clients_of_many_addresses_take_a_limited_number_of_threads(server: WorkerServer) -> None:
    with ExitStack() as stack:
        for number in range(2, 62):
            hold_open(server, stack, f"127.0.0.{number}", count=3)
            assert read(server, "/healthz") == b"ok\n"
            assert count_threads() <= 2 * MAX_CONNECTIONS
        wait_until(server, served=MAX_CONNECTIONS)


def test_client_at_its_limit_still_gets_answers_to_whole_requests(server: WorkerServer) -> None:
    with ExitStack() as stack:
        hold_open(server, stack, "127.0.0.1", count=MAX_CONNECTIONS_PER_ADDRESS)
        assert read(server, "/healthz") == b"ok\n"


def test_connection_that_sends_its_request_slowly_is_closed(
    server: WorkerServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connections, "MAX_SECONDS", 0.2)
    with ExitStack() as stack:
        (slow,) = hold_open(server, stack, "127.0.0.2", count=1)
        slow.settimeout(0.02)
        end = time.monotonic() + 10
        while True:
            assert time.monotonic() < end, "the connection stays open"
            try:
                slow.sendall(b"x")
                assert slow.recv(1) == b""
                break
            except TimeoutError:
                continue
            except OSError:
                break
        wait_until(server, served=0)
    assert capfd.readouterr().err == "", "a client can't fill the log"
