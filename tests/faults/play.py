"""A whole run with faults on its way, and the report of it: what the tests look at and the table is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faults.books import Books, audit
from tests.faults.cells import Cell
from tests.faults.recipe import EPOCHS, KINDS, build_run
from tests.faults.recorder import Point, Record, Recorder
from tests.faults.registry import copy_image
from tests.faults.release import Site
from tests.faults.scene import Fault, Scene, carry_out, running
from tests.faults.volumes import FOLDER, Disk, Volume, build_volume, claim_name

Plan = list[tuple[str, Fault]]
"""Stages and what is done to them, in order."""


@dataclass(kw_only=True, slots=True)
class Report:
    """One run."""

    name: str
    words: str
    cells: list[Cell] = field(default_factory=list)
    books: dict[str, Books] = field(default_factory=dict)
    """By stage that has succeeded."""
    seconds: dict[str, int] = field(default_factory=dict)
    """The operator's ledger, by bucket."""
    wall: float = 0.0
    """Seconds from the run's start to its end, without those in which it had failed and waited for people."""
    lost_steps: int = 0
    """As the operator counted them."""
    status: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def write(self) -> None:
        """Into build/faults, also of a run that went wrong."""
        (FOLDER / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1))


def play(site: Site, name: str, words: str, plan: Plan) -> Report:
    """Carry a run out to whose stages the faults of a plan are done, each once."""
    faults = [fault for _, fault in plan]
    report = Report(name=name, words=words)
    with open_scene(
        site,
        report,
        policy={key: value for fault in faults for key, value in fault.policy.items()},
        needs_disk=any(fault.needs_disk for fault in faults),
        needs_copy=any(fault.needs_copy for fault in faults),
    ) as scene:
        carry_out(scene, plan, report.cells)
    return report


@contextmanager
def open_scene(
    site: Site, report: Report, *, policy: dict[str, int], needs_disk: bool = False, needs_copy: bool = False
) -> Iterator[Scene]:
    """A run that was just applied; what it left is noted when the block ends, and then it is deleted."""
    volume = (Disk if needs_disk else Volume)(report.name)
    recorder = Recorder(site.api, report.name)
    scene = Scene(
        api=site.api, kubectl=site.kubectl, recorder=recorder, volume=volume, run=report.name, namespace=site.namespace,
        system=site.system, image=site.trainer_image, copy=copy_image(site.trainer_image) if needs_copy else None,
    )  # fmt: skip
    image = "" if scene.copy is None else scene.copy.image.name
    document = build_run(report.name, site.namespace, claim=claim_name(volume), policy=policy, image=image)
    volume.make()
    try:
        with running(scene, document, build_volume(volume, site.namespace)):
            try:
                yield scene
            finally:
                note(report, recorder, volume.folder)
                report.write()
    finally:
        volume.remove()


def note(report: Report, recorder: Recorder, storage: Path) -> None:
    """What the run left."""
    report.status, report.points = recorder.status, recorder.record.points
    for stage in recorder.status.get("stages", []):
        if stage["state"] == "Succeeded":
            report.books[stage["name"]] = audit(storage, stage, KINDS[stage["name"]], EPOCHS)
    for cell in report.cells:
        books = report.books.get(cell.stage, Books(doubled=0, missing=0))
        cell.doubled, cell.missing = books.doubled, books.missing
    goodput = recorder.status.get("goodput", {})
    report.seconds, report.lost_steps = goodput.get("seconds", {}), goodput.get("lostSteps", 0)
    report.wall = measure_wall(recorder.record)


def measure_wall(record: Record) -> float:
    """Seconds in which the run was active, by the times in its status."""
    statuses = [status for _, status in record.statuses]
    if not statuses or not statuses[-1].get("completionTime"):
        return 0.0
    whole = seconds_of(statuses[-1]["completionTime"]) - seconds_of(statuses[0]["startTime"])
    idle = sum(
        at - seconds_of(before["completionTime"])
        for (_, before), (at, after) in pairwise(record.statuses)
        if before.get("completionTime") and not after.get("completionTime")
    )
    return whole - idle


def seconds_of(time: str) -> float:
    """Since 1970, of an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()
