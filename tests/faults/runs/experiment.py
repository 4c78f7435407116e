"""One run on the cluster: a fault is injected in the middle of each stage, and the run must recover each time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.environment.api import ClusterReader
from tests.faults.environment.host import WorkerContainer
from tests.faults.environment.registry import ImageCopy
from tests.faults.environment.volumes import DiskVolume, FolderVolume
from tests.faults.runs.audit import IMAGES_PER_UNIT, TrainingLog, count_repeated_answers, read_unit_times
from tests.faults.runs.effects import WORKING, FaultEffect, fill_in_effect, find_interruption, find_recovery
from tests.faults.runs.recorder import ProgressPoint, RunRecorder
from tests.faults.runs.spec import KINDS
from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import require_success

READY_SECONDS = 300
"""Time until a stage is in its middle."""
RECOVERY_SECONDS = 300
END_SECONDS = 900
MIN_UNSAVED_STEPS = 2
"""Steps beyond the last checkpoint before a fault is injected into a training, so that work can be lost."""
RepeatedWorkCounter = Callable[[FaultEffect], int]
"""Returns, at the end of the run, how much work was repeated because of a fault."""
RevertWhen = Literal["at once", "failed", "stuck", "recovered", "run failed"]


@dataclass(kw_only=True)
class Experiment:
    """A run with everything that faults are injected into."""

    api: ClusterReader
    kubectl: Kubectl
    recorder: RunRecorder
    volume: FolderVolume
    run: str
    namespace: str
    system_namespace: str
    """Namespace of the operator."""
    image: str
    """The trainer's image."""
    image_copy: ImageCopy | None = None
    """The run's own copy of it, if a fault needs one."""
    injected_at: float = 0.0
    """Unix time of the last injection, in seconds."""
    progress_at_injection: ProgressPoint | None = None

    def mark_injection(self) -> None:
        """Record time and progress; faults call it right before they are injected."""
        self.injected_at, self.progress_at_injection = time.time(), self.recorder.now

    def workers(self) -> list[WorkerContainer]:
        """Return both workers of the running attempt, by index."""
        now = self.recorder.now
        assert now is not None
        found = [w for w in self.recorder.workers if (w.stage, w.attempt) == (now.stage, now.attempt)]
        assert [w.index for w in found] == [0, 1], found
        return found

    @property
    def stage(self) -> str:
        """The name of the active stage."""
        assert self.recorder.now is not None
        return self.recorder.now.stage

    @property
    def disk(self) -> DiskVolume:
        """The run's volume, for faults that need a disk."""
        assert isinstance(self.volume, DiskVolume), "the fault needs a separate disk"
        return self.volume

    def output(self, stage: str) -> Path:
        """Return a stage's output folder on the host."""
        return self.volume.folder / str(self.recorder.get_stage(stage)["output"])

    def call(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl in the run's namespace; it must succeed."""
        return require_success(self.kubectl("-n", self.namespace, *arguments, stdin=stdin))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault to be injected into stages, and its expected effects."""

    name: str
    title: str
    inject: Callable[[Experiment], AbstractContextManager[None]]
    """Injects the fault when entered and reverts it when left."""
    revert_when: RevertWhen = "at once"
    cause: str | Mapping[str, str] = ""
    """Cause of the first failure, also by kind of stage; empty if no attempt fails."""
    interrupts: bool = True
    """Whether work is interrupted and resumed."""
    stuck: str = ""
    """Reason of the Stuck condition that reports it."""
    node: str = ""
    """The failed node; empty if none failed or any may have."""
    kinds: tuple[str, ...] = tuple(KINDS.values())
    """Kinds of stages that the fault applies to."""
    policy: Mapping[str, int] = field(default_factory=dict)
    """The run's restartPolicy."""
    needs_disk: bool = False
    needs_image_copy: bool = False
    in_curation: Fault | None = None
    """The fault that replaces this one in curation."""

    def cause_in(self, kind: str) -> str:
        """Return the expected cause for a kind of stage."""
        return self.cause if isinstance(self.cause, str) else self.cause[kind]

    def plan(self, stages: Sequence[str]) -> list[tuple[str, Fault]]:
        """Return the stages that the fault applies to, each with the fault to inject."""
        chosen = [(s, self.in_curation if KINDS[s] == "curate" and self.in_curation else self) for s in stages]
        return [(stage, fault) for stage, fault in chosen if KINDS[stage] in fault.kinds]


def inject_all(experiment: Experiment, plan: list[tuple[str, Fault]], effects: list[FaultEffect]) -> None:
    """Inject each fault in its stage and wait for the end of the run; `effects` grows as they become known."""
    recorder, counters = experiment.recorder, []
    for stage, fault in plan:
        effect, counter = inject_one(experiment, stage, fault)
        effects.append(effect)
        counters.append(counter)
    recorder.wait_for(
        "the end of the run",
        lambda: recorder.get_true_condition("Succeeded") or recorder.get_true_condition("Failed"),
        END_SECONDS,
    )
    for effect, counter in zip(effects, counters, strict=True):
        effect.final_state, effect.repeated_work = recorder.get_stage(effect.stage)["state"], counter(effect)


def inject_one(experiment: Experiment, stage: str, fault: Fault) -> tuple[FaultEffect, RepeatedWorkCounter]:
    """Inject a fault in the middle of a stage and wait until the stage has done a new step."""
    recorder = experiment.recorder
    recorder.wait_for(f"the middle of {stage}", lambda: is_mid_stage(recorder, stage), READY_SECONDS)
    counter = count_repeated_work(experiment, stage)
    with fault.inject(experiment):
        assert experiment.progress_at_injection is not None
        assert experiment.progress_at_injection.stage == stage
        effect = FaultEffect(
            fault=fault.name,
            stage=stage,
            kind=KINDS[stage],
            injected_at=experiment.injected_at,
            attempt=experiment.progress_at_injection.attempt,
            is_interrupted=fault.interrupts,
        )
        wait_until_revert(experiment, effect, fault)
    if fault.revert_when == "run failed":
        experiment.call("annotate", "svr", experiment.run, f"sailvl.dev/restart-stage={stage}")
    wait_for_recovery(experiment, effect)
    fill_in_effect(effect, recorder.observations)
    return effect, counter


def is_mid_stage(recorder: RunRecorder, stage: str) -> bool:
    """Return whether a stage makes progress, has work to lose, and is far from its end."""
    now = recorder.now
    if now is None or now.stage != stage or now.state != "Running" or now.phase not in WORKING or not now.step:
        is_finished = recorder.get_stage(stage).get("state") in ("Succeeded", "Failed")
        assert not is_finished, f"{stage} is finished: {recorder.get_stage(stage)}"
        return False
    if KINDS[stage] in ("curate", "evaluate"):
        return now.step * 8 >= now.steps
    return now.saved is not None and now.step - now.saved >= MIN_UNSAVED_STEPS


def wait_until_revert(experiment: Experiment, effect: FaultEffect, fault: Fault) -> None:
    """Wait until the fault is to be reverted."""
    recorder = experiment.recorder

    def has_failed() -> bool:
        stage = recorder.get_stage(effect.stage)
        return bool(stage.get("lastFailure", {}).get("attempt", 0) >= effect.attempt)

    match fault.revert_when:
        case "failed":
            recorder.wait_for(f"a failure of {effect.stage} by {fault.name}", has_failed, RECOVERY_SECONDS)
        case "stuck":
            is_reported = lambda: recorder.get_true_condition("Stuck").get("reason") == fault.stuck  # noqa: E731
            recorder.wait_for(f"Stuck for {fault.name}", is_reported, RECOVERY_SECONDS)
        case "run failed":
            is_failed = lambda: recorder.get_true_condition("Failed")  # noqa: E731
            recorder.wait_for(f"the failure of the run by {fault.name}", is_failed, RECOVERY_SECONDS)
        case "recovered":
            wait_for_recovery(experiment, effect)


def wait_for_recovery(experiment: Experiment, effect: FaultEffect) -> None:
    """Wait until the stage has done a new step or has succeeded."""
    recorder = experiment.recorder

    def has_recovered() -> bool:
        if recorder.get_stage(effect.stage)["state"] == "Succeeded":
            return True
        points = [point for point in recorder.observations.points if point.stage == effect.stage]
        broken = find_interruption(points, effect)
        if broken is None and effect.is_interrupted:
            return False  # a terminating worker makes steps until it has saved
        effect.step = max(
            (p.step for p in points if p.at < (effect.injected_at if broken is None else broken.at)), default=0
        )
        return find_recovery(points, effect, broken)[1] is not None

    recorder.wait_for(f"recovery of {effect.stage} from {effect.fault}", has_recovered, RECOVERY_SECONDS)


def count_repeated_work(experiment: Experiment, stage: str) -> RepeatedWorkCounter:
    """Return a function that counts the work repeated from now on; call it when the effect is filled in."""
    output = experiment.output(stage)
    match KINDS[stage]:
        case "curate":
            before = read_unit_times(output)
            return lambda _: (
                IMAGES_PER_UNIT * sum(read_unit_times(output).get(name) != at for name, at in before.items())
            )
        case "evaluate":
            repeated = count_repeated_answers(output)
            return lambda _: count_repeated_answers(output) - repeated
    return lambda effect: TrainingLog(output).count_repeated(effect.attempt, effect.attempts)


@contextmanager
def applied_run(experiment: Experiment, document: dict[str, Any], volume: dict[str, Any]) -> Iterator[None]:
    """Apply a run and record it; delete it with its volume afterwards."""
    experiment.call("apply", "-f", "-", stdin=json.dumps(volume))
    experiment.call("apply", "-f", "-", stdin=json.dumps(document))
    experiment.recorder.start()
    try:
        yield
    finally:
        experiment.recorder.stop()
        experiment.kubectl("-n", experiment.namespace, "delete", "svr", experiment.run, "--timeout=60s")
        experiment.kubectl("-n", experiment.namespace, "wait", "--for=delete", "pods", "--all", "--timeout=60s")
        experiment.kubectl("-n", experiment.namespace, "delete", "pvc", "--all", "--timeout=30s")
        experiment.kubectl(
            "delete", "pv", f"{experiment.namespace}-{experiment.volume.name}", "--ignore-not-found", "--timeout=30s"
        )
