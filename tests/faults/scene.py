"""One run on the cluster and what is done to it: it is carried to each stage's middle, hit there, and carried on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.api import Api
from tests.faults.books import UNIT, TrainingFiles, count_answered_twice, read_units
from tests.faults.cells import WORKING, Cell, fill_in, find_interruption, find_recovery
from tests.faults.host import Worker
from tests.faults.recipe import KINDS
from tests.faults.recorder import Point, Recorder
from tests.faults.registry import Copy
from tests.faults.volumes import Disk, Volume
from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import must

READY_SECONDS = 300
"""Until a stage is in its middle."""
RECOVERY_SECONDS = 300
END_SECONDS = 900
UNSAVED = 2
"""Steps beyond a checkpoint at which a training is hit, at least: something is at stake."""
Redone = Callable[[Cell], int]
"""How much was done again because of a cell, known at the end."""
Until = Literal["at once", "failed", "stuck", "recovered", "over"]


@dataclass(kw_only=True)
class Scene:
    api: Api
    kubectl: Kubectl
    recorder: Recorder
    volume: Volume
    run: str
    namespace: str
    system: str
    """Where the operators are."""
    image: str
    """The trainer's."""
    copy: Copy | None = None
    """The run's own copy of it, if it has one."""
    struck: float = 0.0
    hit: Point | None = None
    """Where the run stood when it was hit."""

    def strike(self) -> None:
        """Called by an injection right before it does harm."""
        self.struck, self.hit = time.time(), self.recorder.now

    def workers(self) -> list[Worker]:
        """Of the attempt that runs, by index; both are there."""
        now = self.recorder.now
        assert now is not None
        found = [w for w in self.recorder.workers if (w.stage, w.attempt) == (now.stage, now.attempt)]
        assert [w.index for w in found] == [0, 1], found
        return found

    @property
    def stage(self) -> str:
        """The active one."""
        assert self.recorder.now is not None
        return self.recorder.now.stage

    @property
    def disk(self) -> Disk:
        assert isinstance(self.volume, Disk), "the fault asks for a disk"
        return self.volume

    def output(self, stage: str) -> Path:
        """A stage's folder on this machine."""
        return self.volume.folder / str(self.recorder.stage(stage)["output"])

    def call(self, *words: str, stdin: str | None = None) -> str:
        """kubectl in the run's namespace; it has to succeed."""
        return must(self.kubectl("-n", self.namespace, *words, stdin=stdin))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that is done to a stage, and what has to come of it."""

    name: str
    words: str
    inject: Callable[[Scene], AbstractContextManager[None]]
    """Does the harm when entered, takes it back when left."""
    until: Until = "at once"
    """When it is taken back."""
    cause: str | Mapping[str, str] = ""
    """Of the first failure, or by kind of stage; empty: no attempt fails."""
    interrupts: bool = True
    """Whether work is interrupted and begun again."""
    stuck: str = ""
    """Reason of the condition that tells of it."""
    node: str = ""
    """The machine that is at fault; empty: none, or any."""
    kinds: tuple[str, ...] = tuple(KINDS.values())
    """Stages that can have it."""
    policy: Mapping[str, int] = field(default_factory=dict)
    """The run's restartPolicy."""
    needs_disk: bool = False
    needs_copy: bool = False
    """The run has an image of its own."""
    in_curation: Fault | None = None
    """What is done to curation in its place."""

    def cause_in(self, kind: str) -> str:
        """That of a kind of stage."""
        return self.cause if isinstance(self.cause, str) else self.cause[kind]

    def plan(self, stages: Sequence[str]) -> list[tuple[str, Fault]]:
        """What is done to which of some stages."""
        chosen = [(s, self.in_curation if KINDS[s] == "curate" and self.in_curation else self) for s in stages]
        return [(stage, fault) for stage, fault in chosen if KINDS[stage] in fault.kinds]


def carry_out(scene: Scene, plan: list[tuple[str, Fault]], cells: list[Cell]) -> None:
    """Hit the stages in turn and see the run to its end; adds to `cells` as they become known."""
    recorder, counts = scene.recorder, []
    for stage, fault in plan:
        cell, count = hit(scene, stage, fault)
        cells.append(cell)
        counts.append(count)
    recorder.wait("the end", lambda: recorder.condition("Succeeded") or recorder.condition("Failed"), END_SECONDS)
    for cell, count in zip(cells, counts, strict=True):
        cell.end, cell.lost = recorder.stage(cell.stage)["state"], count(cell)


def hit(scene: Scene, stage: str, fault: Fault) -> tuple[Cell, Redone]:
    """One fault in one stage, until the work has come beyond where it was."""
    recorder = scene.recorder
    recorder.wait(f"{stage} in its middle", lambda: is_in_its_middle(recorder, stage), READY_SECONDS)
    redone = count_redone(scene, stage)
    with fault.inject(scene):
        assert scene.hit is not None
        assert scene.hit.stage == stage
        cell = Cell(
            fault=fault.name,
            stage=stage,
            kind=KINDS[stage],
            struck=scene.struck,
            attempt=scene.hit.attempt,
            is_interrupted=fault.interrupts,
        )
        await_turn(scene, cell, fault)
    if fault.until == "over":
        scene.call("annotate", "svr", scene.run, f"sailvl.dev/restart-stage={stage}")
    await_recovery(scene, cell)
    fill_in(cell, recorder.record)
    return cell, redone


def is_in_its_middle(recorder: Recorder, stage: str) -> bool:
    """It works, has something to lose, and is far from its end."""
    now = recorder.now
    if now is None or now.stage != stage or now.state != "Running" or now.phase not in WORKING or not now.step:
        over = recorder.stage(stage).get("state") in ("Succeeded", "Failed")
        assert not over, f"{stage} is over: {recorder.stage(stage)}"
        return False
    if KINDS[stage] in ("curate", "evaluate"):
        return now.step * 8 >= now.steps
    return now.saved is not None and now.step - now.saved >= UNSAVED


def await_turn(scene: Scene, cell: Cell, fault: Fault) -> None:
    """Until the harm is to be taken back."""
    recorder = scene.recorder

    def has_failed() -> bool:
        stage = recorder.stage(cell.stage)
        return bool(stage.get("lastFailure", {}).get("attempt", 0) >= cell.attempt)

    match fault.until:
        case "failed":
            recorder.wait(f"{fault.name} fails {cell.stage}", has_failed, RECOVERY_SECONDS)
        case "stuck":
            told = lambda: recorder.condition("Stuck").get("reason") == fault.stuck  # noqa: E731
            recorder.wait(f"{fault.name} is told of", told, RECOVERY_SECONDS)
        case "over":
            recorder.wait(f"{fault.name} ends the run", lambda: recorder.condition("Failed"), RECOVERY_SECONDS)
        case "recovered":
            await_recovery(scene, cell)


def await_recovery(scene: Scene, cell: Cell) -> None:
    """Until the stage has come further than it was, or has succeeded."""
    recorder = scene.recorder

    def is_beyond() -> bool:
        if recorder.stage(cell.stage)["state"] == "Succeeded":
            return True
        points = [point for point in recorder.record.points if point.stage == cell.stage]
        broken = find_interruption(points, cell)
        if broken is None and cell.is_interrupted:
            return False  # a worker that is told to end goes on until it has saved
        cell.step = max((p.step for p in points if p.at < (cell.struck if broken is None else broken.at)), default=0)
        return find_recovery(points, cell, broken)[1] is not None

    recorder.wait(f"{cell.stage} goes on after {cell.fault}", is_beyond, RECOVERY_SECONDS)


def count_redone(scene: Scene, stage: str) -> Redone:
    """What counts, once the cell is filled in, how much was done again since now."""
    output = scene.output(stage)
    match KINDS[stage]:
        case "curate":
            before = read_units(output)
            return lambda _: UNIT * sum(read_units(output).get(name) != at for name, at in before.items())
        case "evaluate":
            answered = count_answered_twice(output)
            return lambda _: count_answered_twice(output) - answered
    return lambda cell: TrainingFiles(output).count_lost(cell.attempt, cell.attempts)


@contextmanager
def running(scene: Scene, document: dict[str, Any], volume: dict[str, Any]) -> Iterator[None]:
    """The run applied and watched, and deleted with its claim afterwards."""
    scene.call("apply", "-f", "-", stdin=json.dumps(volume))
    scene.call("apply", "-f", "-", stdin=json.dumps(document))
    scene.recorder.start()
    try:
        yield
    finally:
        scene.recorder.stop()
        scene.kubectl("-n", scene.namespace, "delete", "svr", scene.run, "--timeout=60s")
        scene.kubectl("-n", scene.namespace, "wait", "--for=delete", "pods", "--all", "--timeout=60s")
        scene.kubectl("-n", scene.namespace, "delete", "pvc", "--all", "--timeout=30s")
        scene.kubectl("delete", "pv", f"{scene.namespace}-{scene.volume.name}", "--ignore-not-found", "--timeout=30s")
