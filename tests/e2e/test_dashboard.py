"""Every panel of the chart's dashboards shows data of the whole run in a real Prometheus."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.live.prometheus import Prometheus
from tests.support.live.whole_run import WholeRun

pytestmark = pytest.mark.e2e

DASHBOARDS = Path(__file__).parents[2] / "helm/sailvl-operator/dashboards"
SCRAPE_SECONDS = 20
"""Time after which current values have been scraped."""
VARIABLES = {"$__rate_interval": "1h", "$__interval": "1h", "$__range": "1h"}


def list_queries() -> list[Any]:
    """Return the query of every target of every panel."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        panels = json.loads(path.read_text())["panels"]
        for panel in [*panels, *(inner for row in panels for inner in row.get("panels", []))]:
            for target in panel.get("targets", []):
                found.append(pytest.param(target["expr"], id=f"{panel['title']} {target.get('refId', '')}"))
    return found


@pytest.mark.parametrize("expression", list_queries())
def test_panel_has_data(expression: str, whole_run: WholeRun, prometheus: Prometheus) -> None:
    filled = expression
    for name, value in VARIABLES.items():
        filled = filled.replace(name, value)
    filled = re.sub(r'=~?"\$\{?\w+\}?"', '=~".*"', filled)
    # an instant query covers five minutes, less than the run; the end of the run is in the next scrape
    over_run = f"last_over_time(({filled})[1h:5s])"
    until = time.monotonic() + SCRAPE_SECONDS
    while not (found := prometheus.query(filled) or prometheus.query(over_run)) and time.monotonic() < until:
        time.sleep(1)
    assert found, filled
