"""The worker's HTTP server: /metrics for Prometheus, /progress for the operator and /healthz for the kubelet."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from sailvl_trainer.contract import Env
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.worker.connections import MAX_SECONDS, OpenConnections

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
"""Time between two checks for expired connections and for the end of the server."""


class WorkerServer(ThreadingHTTPServer):
    """An HTTP server on IPv6 and IPv4, if the machine has both, because a cluster's pods may have either.

    Its connections, and so its threads, are limited: clients that hold connections open don't keep others away.
    """

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections = OpenConnections()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a new connection may be served."""
        return self.connections.add(request, client_address[0])

    def service_actions(self) -> None:
        """Close connections that last too long; called once per _POLL_SECONDS or more often."""
        self.connections.close_expired()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has ended, or that is refused."""
        self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a request, unless its client has ended the connection, or its connection was closed."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("can't answer a request of %s", client_address[0])


def start_server(port: int, scratch: Scratch) -> WorkerServer:
    """Serve in a thread; port 0 takes a free one. Raises ConfigError if the port is in use."""

    class Handler(BaseHTTPRequestHandler):
        timeout = MAX_SECONDS

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
    threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True).start()
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
