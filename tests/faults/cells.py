"""What one fault did to one stage, from what was seen and from the files that the stage left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.recorder import Point, Record

WORKING = ("running", "checkpointing")


@dataclass(kw_only=True, slots=True)
class Cell:
    """A fault in a stage."""

    fault: str
    stage: str
    kind: str
    struck: float
    """Unix seconds at which it was done."""
    attempt: int
    """The one that was hit."""
    is_interrupted: bool = True
    """Whether the work has to be begun again."""
    step: int = 0
    """The last one that it was seen to have done."""
    again: float | None = None
    """Seconds until a step was done after the interruption; None: nothing was interrupted."""
    beyond: float | None = None
    """Seconds until a step was done that had not been done before."""
    attempts: int = 1
    """Of the stage until then."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Every lastFailure until then."""
    counted_restarts: dict[str, int] = field(default_factory=dict)
    """Against the budgets, right after the first failure."""
    stuck: list[str] = field(default_factory=list)
    """Reasons and words of the Stuck condition until then."""
    said: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    """Lines of `kubectl get svr` until then: seconds since the fault, cells."""
    lost: int = 0
    """Steps, samples or questions that were done and had to be done again."""
    doubled: int = 0
    missing: int = 0
    end: str = ""
    """State of the stage at the end."""

    @property
    def cause(self) -> str:
        """Of the first failure; empty: no attempt failed."""
        return str(self.failures[0]["cause"]) if self.failures else ""

    @property
    def until(self) -> float:
        """Unix seconds at which it was over."""
        return self.struck + (self.beyond or 0.0)


def fill_in(cell: Cell, record: Record) -> None:
    """All that follows from what was seen, once the stage has come further than it was."""
    points = [point for point in record.points if point.stage == cell.stage]
    broken = find_interruption(points, cell)
    before = [p.step for p in points if broken is None or p.at < broken.at]
    cell.step = max((p.step for p in points if p.at <= cell.struck), default=0) if broken is None else max(before)
    cell.again, cell.beyond = find_recovery(points, cell, broken)
    stages = list(stage_history(record, cell))
    if cell.beyond is None:
        done = next((at for at, stage in stages if stage["state"] == "Succeeded"), None)
        cell.beyond = None if done is None else done - cell.struck
    stages = [(at, stage) for at, stage in stages if at <= cell.until + 1]
    cell.attempts = stages[-1][1]["attempt"] if stages else cell.attempt
    told = [(s["lastFailure"], s) for _, s in stages if s.get("lastFailure", {}).get("attempt", 0) >= cell.attempt]
    cell.failures = distinct(failure for failure, _ in told)
    cell.counted_restarts = dict(told[0][1].get("countedRestarts", {})) if told else {}
    cell.stuck = distinct(words for at, words in stuck_history(record) if cell.struck <= at <= cell.until + 1)
    cell.said = [(at - cell.struck, line) for at, line in shown_during(record, cell)]


def find_interruption(points: Sequence[Point], cell: Cell) -> Point | None:
    """The first sign that the work was begun again: the next attempt, or ranks that start in the same one."""
    after = (point for point in points if point.at > cell.struck)
    is_restart = ((p, p.attempt > cell.attempt or (p.phase == "starting" and p.attempt == cell.attempt)) for p in after)
    return next((point for point, is_so in is_restart if is_so), None)


def find_recovery(points: Sequence[Point], cell: Cell, broken: Point | None) -> tuple[float | None, float | None]:
    """Seconds until the first step after the interruption, and until the first new one."""
    since = cell.struck if broken is None else broken.at
    working = [point for point in points if point.at > since and point.phase in WORKING]
    begun = working[0].step if working else 0
    again = next((p.at for p in points if working and p.at > working[0].at and is_further(p, begun)), None)
    beyond = next((point.at for point in points if point.at > since and is_further(point, cell.step)), None)
    if broken is None:
        again = None
    elif beyond is not None:
        again = min(again or beyond, beyond)  # a new step is a step
    return tuple(None if at is None else at - cell.struck for at in (again, beyond))  # type: ignore[return-value]


def is_further(point: Point, step: int) -> bool:
    """Whether it tells of a step that is new; a document of ranks that only start tells of their predecessors."""
    return point.phase in (*WORKING, "evaluating", "finished") and point.step > step


def stage_history(record: Record, cell: Cell) -> Iterator[tuple[float, dict[str, Any]]]:
    """The stage's statuses since the fault."""
    for at, status in record.statuses:
        if at >= cell.struck:
            yield from ((at, stage) for stage in status["stages"] if stage["name"] == cell.stage)


def stuck_history(record: Record) -> Iterator[tuple[float, str]]:
    for at, status in record.statuses:
        for condition in status["conditions"]:
            if condition["type"] == "Stuck" and condition["status"] == "True":
                yield at, f"{condition['reason']}: {condition['message']}"


def shown_during(record: Record, cell: Cell) -> list[tuple[float, dict[str, str]]]:
    """The line that stood when it was done, and all until it was over."""
    before = [entry for entry in record.lines if entry[0] <= cell.struck][-1:]
    return before + [entry for entry in record.lines if cell.struck < entry[0] <= cell.until + 1]


def distinct(things: Iterator[Any]) -> list[Any]:
    """In order."""
    found: list[Any] = []
    for thing in things:
        if thing not in found:
            found.append(thing)
    return found
