"""Faults at random times: every run ends with the result of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from tests.faults.environment.installation import Installation
from tests.faults.environment.volumes import FOLDER
from tests.faults.injections.chaos import POLICY, Chaos, is_finished
from tests.faults.reporting.chaos_plot import draw_chaos
from tests.faults.reporting.page import PLOTS, record_chaos, write_page
from tests.faults.runs.experiment import END_SECONDS
from tests.faults.runs.report import ExperimentReport, open_experiment, run_experiment
from tests.faults.runs.spec import KINDS

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("SAILVL_CHAOS_SEED", "1"))
MINUTES = float(os.environ.get("SAILVL_CHAOS_MINUTES", "30"))


def log(text: str) -> None:
    with (FOLDER / "chaos.log").open("a") as file:
        file.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")


def run_under_chaos(installation: Installation, chaos: Chaos, name: str, until: float) -> ExperimentReport:
    """Run a recipe to its end, with faults until a monotonic time."""
    report, before = ExperimentReport(name=name, title=f"chaos, seed {chaos.seed}"), len(chaos.events)
    with open_experiment(installation, report, policy=POLICY, needs_disk=True) as experiment:
        chaos.inject_until(experiment, until)
        experiment.recorder.wait_for("the end of the run", lambda: is_finished(experiment), END_SECONDS)
    log(f"{name}: {len(chaos.events) - before} faults; " + ", ".join(describe_stage(report, s) for s in KINDS))
    return report


def describe_stage(report: ExperimentReport, stage: str) -> str:
    [found] = [s for s in report.status["stages"] if s["name"] == stage]
    return f"{stage} {found['state']} {found.get('attempt', 0)}"


def get_results(report: ExperimentReport) -> dict[str, tuple[int, int, str]]:
    return {stage: (audit.duplicates, audit.missing, audit.digest) for stage, audit in report.audits.items()}


def test_runs_under_chaos_end_with_undisturbed_result(installation: Installation) -> None:
    log(f"seed {SEED}, {MINUTES:g} minutes")
    undisturbed = run_experiment(installation, "undisturbed", "nothing", [])
    chaos, reports = Chaos(seed=SEED, log=log), list[ExperimentReport]()
    until = time.monotonic() + 60 * MINUTES
    try:
        while time.monotonic() < until:
            reports.append(run_under_chaos(installation, chaos, f"chaos-{len(reports) + 1}", until))
    finally:
        (FOLDER / "chaos.json").write_text(json.dumps([asdict(event) for event in chaos.events], indent=1))
        draw_chaos(PLOTS / "chaos.png", reports, chaos.events)
    assert chaos.events, "no fault was injected"
    assert set(undisturbed.audits) == set(KINDS)
    for report in reports:
        assert get_results(report) == get_results(undisturbed), report.name
        assert sum(report.goodput_seconds.values()) == pytest.approx(report.wall_clock_seconds, rel=0.01), report.name
    log(f"{len(chaos.events)} faults ({chaos.skipped} skipped), {len(reports)} runs, no bit changed")
    record_chaos(seed=SEED, minutes=MINUTES, faults=len(chaos.events), runs=len(reports))
    write_page()
