"""The worker's HTTP server."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from sailvl_trainer.contract import Progress
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.worker.server import start_server


def test_server_serves_progress_and_refuses_a_port_in_use(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    scratch.prepare()
    server = start_server(0, scratch)
    port = server.server_address[1]
    try:
        with pytest.raises(urllib.request.HTTPError) as missing:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5)
        with missing.value as answer:
            assert answer.code == 404
        scratch.progress_file.write_bytes(encode(Progress(attempt=2, phase="running")))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
            assert decode(Progress, answer.read()).attempt == 2
        with pytest.raises(ConfigError, match=f"port {port} for metrics is in use"):
            start_server(int(port), scratch)
    finally:
        server.shutdown()
        server.server_close()
