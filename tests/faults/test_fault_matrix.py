"""Every fault in every kind of stage on a real cluster: the run recovers, and the operator reports the cause."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.environment.installation import Installation
from tests.faults.injections.catalogue import FAULTS, NONE
from tests.faults.reporting.page import write_page
from tests.faults.runs.experiment import Fault
from tests.faults.runs.report import ExperimentReport, run_experiment
from tests.faults.runs.spec import KINDS

pytestmark = pytest.mark.faults


@pytest.fixture(scope="session", params=[NONE, *FAULTS], ids=lambda fault: fault.name)
def fault(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session")
def report(fault: Fault, installation: Installation) -> ExperimentReport:
    """Run a recipe with the fault in each stage and add it to the page."""
    try:
        return run_experiment(installation, fault.name, fault.title, fault.plan(tuple(KINDS)))
    finally:
        write_page()


def test_every_stage_recovers_and_succeeds(report: ExperimentReport) -> None:
    assert {stage["name"]: stage["state"] for stage in report.status["stages"]} == dict.fromkeys(KINDS, "Succeeded")


def test_status_shows_cause_of_first_failure(report: ExperimentReport, fault: Fault) -> None:
    wanted = {stage: chosen.cause_in(KINDS[stage]) for stage, chosen in fault.plan(tuple(KINDS))}
    assert {effect.stage: effect.cause for effect in report.effects} == wanted


def test_status_names_failed_node(report: ExperimentReport, fault: Fault) -> None:
    named = {effect.stage: effect.failures[0].get("node") for effect in report.effects if fault.node}
    assert named == dict.fromkeys(named, fault.node)


def test_no_sample_is_duplicated_or_missing(report: ExperimentReport) -> None:
    counted = {stage: (audit.duplicates, audit.missing) for stage, audit in report.audits.items()}
    assert counted == dict.fromkeys(KINDS, (0, 0))


def test_goodput_ledger_equals_wall_clock(report: ExperimentReport) -> None:
    assert sum(report.goodput_seconds.values()) == pytest.approx(report.wall_clock_seconds, rel=0.01)
