"""The worker's HTTP server: /metrics, /progress and /healthz, for the operator and Prometheus."""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from sailvl_trainer.contract import Env
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.scratch import Scratch


class Server(ThreadingHTTPServer):
    """On IPv6 and IPv4, where the machine has both: a cluster's pods may have either."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def start_server(port: int, scratch: Scratch) -> Server:
    """Serve in a thread; port 0: a free one. Raises ConfigError when the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:  # http.server's name
            body, kind = _answer(self.path, scratch)
            self.send_response(HTTPStatus.OK if body is not None else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
            """Scrapes are no news."""

    try:
        server = Server(("", port), Handler)
    except OSError as error:
        raise ConfigError(
            f"port {port} for metrics is taken ({error}); set {Env.METRICS_PORT} or {Env.METRICS_PORT_OFFSET}"
        ) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _answer(path: str, scratch: Scratch) -> tuple[bytes | None, str]:
    match path.partition("?")[0]:
        case "/metrics":
            return _collect(scratch.metrics_dir), CONTENT_TYPE_LATEST
        case "/progress":
            file = scratch.progress_file
            return (file.read_bytes() if file.exists() else None), "application/json"
        case "/healthz":
            return b"ok\n", "text/plain"
    return None, "text/plain"


def _collect(folder: Path) -> bytes:
    """Of all ranks, the dead ones' counts included; their gauges of the living are taken away when they end."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)
