"""Faults × stages on the real cluster: what becomes of a run to which each is done once in every stage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.catalogue import FAULTS, NONE
from tests.faults.page import write_page
from tests.faults.play import Report, play
from tests.faults.recipe import KINDS
from tests.faults.release import Site
from tests.faults.scene import Fault

pytestmark = pytest.mark.faults


@pytest.fixture(scope="session", params=[NONE, *FAULTS], ids=lambda fault: fault.name)
def fault(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session")
def report(fault: Fault, site: Site) -> Report:
    """The run with the fault in each stage; the page has it at once."""
    try:
        return play(site, fault.name, fault.words, fault.plan(tuple(KINDS)))
    finally:
        write_page()


def test_every_stage_goes_on(report: Report) -> None:
    assert {stage["name"]: stage["state"] for stage in report.status["stages"]} == dict.fromkeys(KINDS, "Succeeded")


def test_the_cause_is_found(report: Report, fault: Fault) -> None:
    wanted = {stage: chosen.cause_in(KINDS[stage]) for stage, chosen in fault.plan(tuple(KINDS))}
    assert {cell.stage: cell.cause for cell in report.cells} == wanted


def test_the_machine_at_fault_is_named(report: Report, fault: Fault) -> None:
    named = {cell.stage: cell.failures[0].get("node") for cell in report.cells if fault.node}
    assert named == dict.fromkeys(named, fault.node)


def test_no_sample_is_doubled_or_missing(report: Report) -> None:
    counted = {stage: (books.doubled, books.missing) for stage, books in report.books.items()}
    assert counted == dict.fromkeys(KINDS, (0, 0))


def test_the_ledger_is_the_wall_clock(report: Report) -> None:
    assert sum(report.seconds.values()) == pytest.approx(report.wall, rel=0.01)
