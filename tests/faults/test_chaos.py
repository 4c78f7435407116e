"""Half an hour of chaos: every run ends with the result of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from tests.faults.chaos import POLICY, Chaos, is_over
from tests.faults.chaos_picture import draw_chaos
from tests.faults.page import PICTURES, note_chaos, write_page
from tests.faults.play import Report, open_scene, play
from tests.faults.recipe import KINDS
from tests.faults.release import Site
from tests.faults.scene import END_SECONDS
from tests.faults.volumes import FOLDER

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("SAILVL_CHAOS_SEED", "1"))
MINUTES = float(os.environ.get("SAILVL_CHAOS_MINUTES", "30"))


def log(words: str) -> None:
    with (FOLDER / "chaos.log").open("a") as file:
        file.write(f"{datetime.now(UTC):%H:%M:%S} {words}\n")


def storm(site: Site, chaos: Chaos, name: str, until: float) -> Report:
    """One run in it, seen to its end; once the time is up it has peace."""
    report, before = Report(name=name, words=f"chaos, seed {chaos.seed}"), len(chaos.blows)
    with open_scene(site, report, policy=POLICY, needs_disk=True) as scene:
        chaos.rage(scene, until)
        scene.recorder.wait("the end", lambda: is_over(scene), END_SECONDS)
    log(f"{name}: {len(chaos.blows) - before} strikes; " + ", ".join(describe_stage(report, s) for s in KINDS))
    return report


def describe_stage(report: Report, stage: str) -> str:
    [found] = [s for s in report.status["stages"] if s["name"] == stage]
    return f"{stage} {found['state']} {found.get('attempt', 0)}"


def results(report: Report) -> dict[str, tuple[int, int, str]]:
    return {stage: (books.doubled, books.missing, books.weights) for stage, books in report.books.items()}


def test_chaos_changes_no_bit(site: Site) -> None:
    log(f"seed {SEED}, {MINUTES:g} minutes")
    calm, chaos, reports = play(site, "calm", "nothing", []), Chaos(seed=SEED, log=log), list[Report]()
    until = time.monotonic() + 60 * MINUTES
    try:
        while time.monotonic() < until:
            reports.append(storm(site, chaos, f"chaos-{len(reports) + 1}", until))
    finally:
        (FOLDER / "chaos.json").write_text(json.dumps([asdict(blow) for blow in chaos.blows], indent=1))
        draw_chaos(PICTURES / "chaos.png", reports, chaos.blows)
    assert chaos.blows, "a chaos without a strike shows nothing"
    assert set(calm.books) == set(KINDS)
    for report in reports:
        assert results(report) == results(calm), report.name
        assert sum(report.seconds.values()) == pytest.approx(report.wall, rel=0.01), report.name
    log(f"{len(chaos.blows)} strikes ({chaos.missed} missed), {len(reports)} runs, no bit changed")
    note_chaos(seed=SEED, minutes=MINUTES, strikes=len(chaos.blows), runs=len(reports))
    write_page()
