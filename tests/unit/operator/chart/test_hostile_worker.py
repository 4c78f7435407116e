"""A worker that serves forged series to a real Prometheus, which scrapes it as the chart's PodMonitor says."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import find_helm, find_object, render
from tests.support.live.prometheus import build_limits, find_prometheus, run_prometheus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"),
    pytest.mark.skipif(find_prometheus() is None, reason="prometheus is neither in PATH nor built (`make cluster`)"),
]

FORGED = """\
sailvl_operator_leading{namespace="sail",job="train-sailvl-operator",pod="other"} 0
sailvl_run_stage_state{namespace="victim",run="demo",stage="sft",state="running"} 1
sailvl_runs{state="stuck"} 99
kube_pod_info{namespace="victim"} 1
sailvl_loss{namespace="victim",pod="other",job="other",instance="other",run="other",stage="sft"} 7
sailvl_mfu{run="demo",stage="sft"} 1 1000
sailvl_pack_fill{run="demo",stage="sft",team="victim",severity="critical"} 1
sailvl_step{run="demo",stage="sft"} 5
"""
"""Series of the operator, of another namespace and run, of another exporter and of another time, with labels of others,
and one of this worker."""
TARGET = {"namespace": "attacker", "pod": "evil-0", "run": "demo", "stage": "sft"}


class Handler(http.server.BaseHTTPRequestHandler):
    page = FORGED.encode()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(self.page)))
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
        """Log no requests."""


class EndlessHandler(Handler):
    page = "".join(f'sailvl_step{{x="{i}"}} 1\n' for i in range(3000)).encode()


class ChangingHandler(Handler):
    """Serves other names, labels and values of labels in every answer, and one series that counts the answers."""

    answers = 0

    @property
    def page(self) -> bytes:
        ChangingHandler.answers += 1
        n = self.answers
        lines = [
            f'sailvl_score{{benchmark="b{n}"}} 1',
            f'sailvl_result{{metric="m{n}"}} 1',
            f'sailvl_activity_seconds_total{{activity="a{n}"}} 1',
            f'sailvl_samples_total{{outcome="o{n}"}} 1',
            f'sailvl_memory_bytes{{kind="k{n}"}} 1',
            f'sailvl_loss{{x{n}="{n}",run="r{n}",stage="s{n}"}} 1',
            f"sailvl_x{n} 1",
            f"sailvl_step {n}",
        ]
        return "".join(line + "\n" for line in lines).encode()


@pytest.fixture
def scrape(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Start a worker with the handler of the test; yield the scrape configuration of the chart for it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    targets = [{"targets": [f"127.0.0.1:{server.server_address[1]}"], "labels": TARGET}]
    limits = build_limits(find_object(render("monitored"), "PodMonitor"))
    yield {"job_name": "sail/train-sailvl-operator-workers", "static_configs": targets} | limits
    server.shutdown()
    server.server_close()


def query_until_scraped(tmp_path: Path, scrape: dict[str, Any], expression: str) -> tuple[list[dict[str, Any]], str]:
    """Return the series of an expression after the first scrape, and the value of `up`."""
    with run_prometheus(tmp_path / "prometheus", [scrape], interval="500ms") as prometheus:
        until = time.monotonic() + 20
        while not (up := prometheus.query("up")) and time.monotonic() < until:
            time.sleep(0.1)
        return prometheus.query(expression), up[0]["value"][1]


@pytest.mark.parametrize("scrape", [Handler], indirect=True)
def test_series_have_the_namespace_and_the_pod_of_their_target(tmp_path: Path, scrape: dict[str, Any]) -> None:
    found, up = query_until_scraped(tmp_path, scrape, '{job=~".+",__name__!~"up|scrape_.*"}')
    labels = [series["metric"] for series in found]
    assert up == "1"
    assert {series["__name__"] for series in labels} == {
        f"sailvl_{name}" for name in ("loss", "mfu", "pack_fill", "step")
    }
    expected = TARGET | {"job": "sail/train-sailvl-operator-workers"}
    assert [{k: v for k, v in series.items() if k not in ("__name__", "instance")} for series in labels] == [
        expected
    ] * 4
    assert all(series["instance"].startswith("127.0.0.1:") for series in labels)


@pytest.mark.parametrize("scrape", [ChangingHandler], indirect=True)
def test_other_series_in_every_answer_add_none(tmp_path: Path, scrape: dict[str, Any]) -> None:
    with run_prometheus(tmp_path / "prometheus", [scrape], interval="500ms") as prometheus:
        until = time.monotonic() + 20
        while not (scrapes := prometheus.query("sailvl_step > 3")) and time.monotonic() < until:
            time.sleep(0.1)
        assert scrapes
        found = prometheus.query('last_over_time({__name__=~"sailvl_.+"}[1m])')
    assert len(found) == 2, "sailvl_step and sailvl_loss"


@pytest.mark.parametrize("scrape", [EndlessHandler], indirect=True)
def test_worker_with_too_many_series_is_not_scraped(tmp_path: Path, scrape: dict[str, Any]) -> None:
    found, up = query_until_scraped(tmp_path, scrape, "sailvl_step")
    assert (found, up) == ([], "0")
