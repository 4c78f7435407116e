"""A simulated cluster for the pure core: it applies decisions at once, and a test decides what its workers do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists
from sailvl_operator.api.status import StageStatus, Status, encode_status
from sailvl_operator.api.types import Defaults
from sailvl_operator.core.decision import AttemptSpec, Decision, DeletionMode, Event
from sailvl_operator.core.desired.workload import count_nodes
from sailvl_operator.core.observe import AttemptKey, JobRecord, Obstacle, PodRecord, observe
from sailvl_operator.core.reconcile import reconcile
from sailvl_trainer.contract import Checkpoint, Progress
from tests.support.builders.operator import build_end, build_job, build_pod, build_result, build_run

DEFAULTS = Defaults(image="trainer:test")
BEFORE_STARTS, FORCE, GRACEFUL = DeletionMode


@dataclass
class CoreWorld:
    """The status, Jobs and pods of one run, and the time."""

    spec: dict[str, object] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    pods: dict[str, PodRecord] = field(default_factory=dict)
    progress: dict[AttemptKey, Progress] = field(default_factory=dict)
    """Progress that the workers report."""
    progress_errors: dict[AttemptKey, str] = field(default_factory=dict)
    """Attempts whose progress can't be read, and why."""
    obstacles: dict[AttemptKey, Obstacle] = field(default_factory=dict)
    """Why attempts don't start."""
    refusals: dict[AttemptKey, Obstacle] = field(default_factory=dict)
    """Errors with which the API server refuses objects of attempts."""
    restart_stage: str = ""
    """Value of the restart annotation."""
    allowed: AllowLists = ALLOW_ALL
    """Allow-lists of the operator."""
    is_deleted: bool = False
    started: list[AttemptSpec] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    now: float = 1000.0
    generation: int = 1
    advances_time: bool = True
    """Whether the time advances to the requeue time of a decision that changes nothing else."""

    def reconcile_once(self) -> bool:
        """Reconcile, apply the decision, and return whether it changed anything."""
        run = build_run(status=encode_status(self.status), generation=self.generation, **self.spec)
        run = msgspec.structs.replace(run, restart_stage=self.restart_stage)
        seen = observe(
            self.jobs.values(),
            self.pods.values(),
            progress=self.progress,
            progress_errors=self.progress_errors,
            obstacles=self.obstacles,
            refusals=self.refusals,
        )
        decision = reconcile(run, seen, now=self.now, defaults=DEFAULTS, allowed=self.allowed)
        for job in (*decision.get_deleted_jobs(BEFORE_STARTS), *decision.get_deleted_jobs(FORCE)):
            self.jobs.pop(job.name)
            self.pods = {n: p for n, p in self.pods.items() if (p.stage, p.attempt) != (job.stage, job.attempt)}
        for job, suspend in decision.suspend:
            self.jobs[job.name] = replace(job, is_suspended=suspend, is_suspended_here=suspend)
        for job in decision.get_deleted_jobs(GRACEFUL):
            self.jobs.pop(job.name)
            self.pods = {n: replace(p, is_gone=True) for n, p in self.pods.items()}
        for attempt in decision.start:
            self._start(attempt)
        self.is_deleted = self.is_deleted or decision.delete_run
        self.restart_stage = "" if decision.clear_restart_request else self.restart_stage
        self.events += decision.events
        self.status = decision.status or self.status
        if self.advances_time and decision.requeue_at is not None and decision.status is None and not decision.start:
            self.now = max(self.now, decision.requeue_at)
            return False
        return decision != Decision(requeue_at=decision.requeue_at)

    def run_until_stable(self) -> StageStatus | None:
        """Reconcile until nothing changes, and return the stage that is active then."""
        for _ in range(50):
            if not self.reconcile_once():
                break
        else:
            pytest.fail("the status never becomes stable: one reconcile undoes another")
        return next((s for s in self.status.stages if s.state not in ("Pending", "Succeeded", "Failed")), None)

    def _start(self, attempt: AttemptSpec) -> None:
        document, nodes = attempt.document, count_nodes(attempt.workers)
        queue = attempt.workers.queue_name if isinstance(attempt.workers.queue_name, str) else ""
        is_queued = bool(queue)
        job = build_job(
            document.stage, document.attempt, nodes=nodes, created=self.now, is_suspended=is_queued, queue=queue
        )
        self.started.append(attempt)
        self.jobs[job.name] = job
        if not is_queued:
            self.add_pods(job)

    def add_pods(self, job: JobRecord) -> None:
        """Create the running pods of a Job that isn't suspended."""
        for index in range(job.nodes):
            pod = build_pod(job.stage, job.attempt, index, created=self.now, placed=self.now)
            self.pods[pod.name] = pod

    def update_pods(self, **fields: Any) -> None:
        """Set fields of all pods, and reconcile until nothing changes."""
        self.pods = {n: replace(p, **fields) for n, p in self.pods.items()}
        self.run_until_stable()

    def end_worker(self, index: int, exit_code: int, **message: object) -> None:
        """Let a worker of the active stage exit; `message` are fields of its termination message."""
        pod = next(p for p in self.pods.values() if p.index == index and p.terminated is None)
        end = build_end(exit_code, at=self.now, **message)
        phase = "Failed" if exit_code else "Succeeded"
        self.pods[pod.name] = replace(pod, phase=phase, is_ready=False, terminated=end)

    def succeed_stage(self, stage: StageStatus, **result: object) -> None:
        """Let all workers of a stage exit with code 0; `result` are fields of the stage's result."""
        for pod in [p for p in self.pods.values() if p.stage == stage.name and p.terminated is None]:
            own = {"result": build_result(stage.name, **result)} if pod.index == 0 else {}
            self.end_worker(pod.index, 0, **own)

    def stage(self, name: str) -> StageStatus:
        """Return the status of a stage."""
        return next(s for s in self.status.stages if s.name == name)


def finish_run(world: CoreWorld) -> None:
    """Let every remaining stage succeed."""
    while (active := world.run_until_stable()) is not None:
        world.succeed_stage(active)


def run_to_active_stage(world: CoreWorld) -> StageStatus:
    """Reconcile until nothing changes, and return the active stage; fail the test if there is none."""
    active = world.run_until_stable()
    assert active is not None
    return active


def request_restart(world: CoreWorld, stage: str) -> None:
    """Annotate the run as a user does, and check that the operator removes the annotation."""
    world.restart_stage = stage
    world.run_until_stable()
    assert world.restart_stage == ""
    assert world.status.observed_restart_request == ""


def fail_attempt(world: CoreWorld, *, saved: int, code: int = 1) -> None:
    """Let the active attempt report its progress and crash."""
    active = run_to_active_stage(world)
    progress = Progress(
        attempt=active.attempt,
        phase="running",
        step=saved + 5,
        lost_steps=5 * (active.attempt - 1),
        checkpoint=Checkpoint(step=saved, path=f"c/{saved}"),
    )
    world.progress[active.name, active.attempt] = progress
    for pod in [p for p in world.pods.values() if p.terminated is None]:
        world.end_worker(pod.index, code)
    world.run_until_stable()
