"""The worker's HTTP server: /metrics for Prometheus, /progress for the operator and /healthz for the kubelet."""

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
from sailvl_trainer.rank.settings import Scratch


class WorkerServer(ThreadingHTTPServer):
    """An HTTP server on IPv6 and IPv4, if the machine has both, because a cluster's pods may have either."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def start_server(port: int, scratch: Scratch) -> WorkerServer:
    """Serve in a thread; port 0 takes a free one. Raises ConfigError if the port is in use."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:  # http.server's name
            body, content_type = _build_response(self.path, scratch)
            self.send_response(HTTPStatus.OK if body is not None else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
            """Log no requests: scrapes would fill the log."""

    try:
        server = WorkerServer(("", port), Handler)
    except OSError as error:
        raise ConfigError(
            f"port {port} for metrics is in use ({error}); set {Env.METRICS_PORT} or {Env.METRICS_PORT_OFFSET}"
        ) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _build_response(path: str, scratch: Scratch) -> tuple[bytes | None, str]:
    """Return the body of a response, None for 404, and its content type."""
    match path.partition("?")[0]:
        case "/metrics":
            return _collect_metrics(scratch.metrics_dir), CONTENT_TYPE_LATEST
        case "/progress":
            file = scratch.progress_file
            return (file.read_bytes() if file.exists() else None), "application/json"
        case "/healthz":
            return b"ok\n", "text/plain"
    return None, "text/plain"


def _collect_metrics(folder: Path) -> bytes:
    """Return the metrics of all ranks; counters include those of ranks that have ended, gauges of live ranks don't."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)
