"""Health server of the operator, and the rules of its probes."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from sailvl_operator.cluster.client import ClientConfig
from sailvl_operator.health import STALE_WATCH_SECONDS, HealthServer, liveness_errors, readiness_errors
from sailvl_operator.metrics_page import MetricsPage
from sailvl_operator.settings import HealthSettings


async def test_probes_and_metrics_are_served():
    registry, errors = CollectorRegistry(), []
    Counter("sailvl_test", "A counter.", registry=registry).inc()
    settings, page = HealthSettings(host="127.0.0.1", port=0), MetricsPage(registry, take_snapshot=lambda: None)
    async with (
        HealthServer(
            settings, page, operator_page=page, liveness=lambda: errors, readiness=lambda: ["not yet"]
        ) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
    ):

        async def get(path: str) -> tuple[int, str]:
            async with session.get(path) as response:
                return response.status, await response.text()

        assert await get("/healthz") == (200, "ok")
        assert await get("/readyz") == (500, "not yet")
        errors.append("watch of pods: no data for 500 s")
        assert await get("/healthz") == (500, errors[0])
        status, text = await get("/metrics")
        assert status == 200
        assert "sailvl_test_total 1.0" in text


@pytest.mark.parametrize(
    ("silent", "oldest", "missing", "errors"),
    [
        pytest.param(1.0, 1.0, 0.0, [], id="healthy"),
        pytest.param(500.0, 1.0, 0.0, ["watch of pods: no data for 500 s"], id="silent watch"),
        pytest.param(1.0, 400.0, 0.0, ["work queue: keys wait, but no worker took any for 400 s"], id="stalled queue"),
        pytest.param(1.0, 1.0, 360.0, ["watch of runs: missing events for 360 s"], id="stale watch of runs"),
    ],
)
def test_liveness_fails_with_the_reason(silent, oldest, missing, errors):
    found = liveness_errors(silent_watches=[("pods", silent)], missing_events_seconds=missing, stalled_seconds=oldest)
    assert found == errors


def test_readiness_requires_synced_informers():
    assert readiness_errors(is_synced=True) == []
    assert readiness_errors(is_synced=False) == ["informers: first lists not complete"]
    assert readiness_errors(is_synced=True, missing_permissions=["not permitted"]) == ["informers: not permitted"]


def test_watch_is_not_stale_before_the_api_server_ends_it():
    assert ClientConfig().watch_timeout_seconds < STALE_WATCH_SECONDS
