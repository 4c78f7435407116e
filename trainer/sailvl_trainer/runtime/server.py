"""The worker's HTTP server: /metrics, /progress and /healthz, for the operator and Prometheus."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from sailvl_trainer.runtime.telemetry import PROGRESS_FILE


def start_server(port: int, scratch: Path, metrics: Path) -> ThreadingHTTPServer:
    """Serve in a thread; port 0: a free one. `metrics`: prometheus_client's multiprocess folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            body, kind = _answer(self.path, scratch, metrics)
            status = HTTPStatus.OK if body is not None else HTTPStatus.NOT_FOUND
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
            """Scrapes are no news."""

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _answer(path: str, scratch: Path, metrics: Path) -> tuple[bytes | None, str]:
    if path == "/metrics":
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(metrics))  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
    if path == "/progress":
        file = scratch / PROGRESS_FILE
        return (file.read_bytes() if file.exists() else None), "application/json"
    return (b"ok\n" if path == "/healthz" else None), "text/plain"
