"""The effect of one fault on one stage, derived from the recorded observations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.runs.recorder import Observations, ProgressPoint

WORKING = ("running", "checkpointing")


@dataclass(kw_only=True, slots=True)
class FaultEffect:
    """One effect of the fault table: what a fault did to a stage."""

    fault: str
    stage: str
    kind: str
    injected_at: float
    """Unix time in seconds."""
    attempt: int
    """The attempt into which the fault was injected."""
    is_interrupted: bool = True
    """Whether work has to be resumed from a checkpoint or result."""
    step: int = 0
    """The last step observed before the interruption."""
    next_step_seconds: float | None = None
    """Seconds until the first step after the interruption; None if nothing was interrupted."""
    new_step_seconds: float | None = None
    """Seconds until the first step that had not been done before."""
    attempts: int = 1
    """Number of the stage's attempt when the new step was done."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Every distinct lastFailure until then."""
    counted_restarts: dict[str, int] = field(default_factory=dict)
    """Restarts counted against the budgets right after the first failure, by cause."""
    stuck: list[str] = field(default_factory=list)
    """Reasons and messages of the Stuck condition until then."""
    printed_rows: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    """Rows of `kubectl get svr` until then: seconds since the fault, and cells by column."""
    repeated_work: int = 0
    """Steps, images or questions that were done and had to be repeated."""
    duplicates: int = 0
    missing: int = 0
    final_state: str = ""
    """State of the stage at the end of the run."""

    @property
    def cause(self) -> str:
        """The cause of the first failure, or an empty string if no attempt failed."""
        return str(self.failures[0]["cause"]) if self.failures else ""

    @property
    def recovered_at(self) -> float:
        """Unix time of the first new step, in seconds."""
        return self.injected_at + (self.new_step_seconds or 0.0)


def fill_in_effect(effect: FaultEffect, observations: Observations) -> None:
    """Derive all other fields of an effect from the observations, once the stage has done a new step."""
    points = [point for point in observations.points if point.stage == effect.stage]
    broken = find_interruption(points, effect)
    before = [p.step for p in points if broken is None or p.at < broken.at]
    effect.step = (
        max((p.step for p in points if p.at <= effect.injected_at), default=0) if broken is None else max(before)
    )
    effect.next_step_seconds, effect.new_step_seconds = find_recovery(points, effect, broken)
    stages = list(list_stage_statuses(observations, effect))
    if effect.new_step_seconds is None:
        done = next((at for at, stage in stages if stage["state"] == "Succeeded"), None)
        effect.new_step_seconds = None if done is None else done - effect.injected_at
    stages = [(at, stage) for at, stage in stages if at <= effect.recovered_at + 1]
    effect.attempts = stages[-1][1]["attempt"] if stages else effect.attempt
    failed = [(s["lastFailure"], s) for _, s in stages if s.get("lastFailure", {}).get("attempt", 0) >= effect.attempt]
    effect.failures = list_distinct(failure for failure, _ in failed)
    effect.counted_restarts = dict(failed[0][1].get("countedRestarts", {})) if failed else {}
    effect.stuck = list_distinct(
        message
        for at, message in list_stuck_messages(observations)
        if effect.injected_at <= at <= effect.recovered_at + 1
    )
    effect.printed_rows = [(at - effect.injected_at, line) for at, line in list_printed_rows(observations, effect)]


def find_interruption(points: Sequence[ProgressPoint], effect: FaultEffect) -> ProgressPoint | None:
    """Return the first point of a restart: the next attempt, or ranks that start again in the same one."""
    after = (point for point in points if point.at > effect.injected_at)
    is_restart = (
        (p, p.attempt > effect.attempt or (p.phase == "starting" and p.attempt == effect.attempt)) for p in after
    )
    return next((point for point, is_so in is_restart if is_so), None)


def find_recovery(
    points: Sequence[ProgressPoint], effect: FaultEffect, broken: ProgressPoint | None
) -> tuple[float | None, float | None]:
    """Return the seconds until the first step after the interruption, and until the first new step."""
    since = effect.injected_at if broken is None else broken.at
    working = [point for point in points if point.at > since and point.phase in WORKING]
    begun = working[0].step if working else 0
    next_step_seconds = next((p.at for p in points if working and p.at > working[0].at and is_beyond(p, begun)), None)
    new_step_seconds = next((point.at for point in points if point.at > since and is_beyond(point, effect.step)), None)
    if broken is None:
        next_step_seconds = None
    elif new_step_seconds is not None:
        next_step_seconds = min(next_step_seconds or new_step_seconds, new_step_seconds)
    return tuple(None if at is None else at - effect.injected_at for at in (next_step_seconds, new_step_seconds))  # type: ignore[return-value]


def is_beyond(point: ProgressPoint, step: int) -> bool:
    """Return whether a point shows a new step; starting ranks still report the step of their predecessors."""
    return point.phase in (*WORKING, "evaluating", "finished") and point.step > step


def list_stage_statuses(observations: Observations, effect: FaultEffect) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the stage's statuses since the fault, with their times."""
    for at, status in observations.statuses:
        if at >= effect.injected_at:
            yield from ((at, stage) for stage in status["stages"] if stage["name"] == effect.stage)


def list_stuck_messages(observations: Observations) -> Iterator[tuple[float, str]]:
    """Yield reason and message of every true Stuck condition, with their times."""
    for at, status in observations.statuses:
        for condition in status["conditions"]:
            if condition["type"] == "Stuck" and condition["status"] == "True":
                yield at, f"{condition['reason']}: {condition['message']}"


def list_printed_rows(observations: Observations, effect: FaultEffect) -> list[tuple[float, dict[str, str]]]:
    """Return the row that kubectl printed at the injection, and all rows until the recovery."""
    before = [entry for entry in observations.printed_rows if entry[0] <= effect.injected_at][-1:]
    return before + [
        entry for entry in observations.printed_rows if effect.injected_at < entry[0] <= effect.recovered_at + 1
    ]


def list_distinct(values: Iterator[Any]) -> list[Any]:
    """Return the distinct values in order of their first occurrence."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
