"""A small world for the pure core: it carries decisions out at once, and a test says what becomes of the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import StageStatus, Status, encode_status
from sailvl_operator.core.decision import AttemptSpec, Decision, DeletionMode, Event
from sailvl_operator.core.desired.workload import count_nodes
from sailvl_operator.core.observe import AttemptKey, JobRecord, PodRecord, observe
from sailvl_operator.core.reconcile import reconcile
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import build_end, build_job, build_pod, build_result, build_run

DEFAULTS = Defaults(image="trainer:test")
BEFORE_STARTS, FORCE, GRACEFUL = DeletionMode


@dataclass
class World:
    """Jobs and pods that obey; time moves only when nothing is left to do."""

    spec: dict[str, object] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    pods: dict[str, PodRecord] = field(default_factory=dict)
    progress: dict[AttemptKey, Progress] = field(default_factory=dict)
    """Progress that the workers report."""
    progress_errors: dict[AttemptKey, str] = field(default_factory=dict)
    """Attempts whose progress can't be read, and why."""
    wait_reasons: dict[AttemptKey, str] = field(default_factory=dict)
    """Why attempts don't start."""
    refusals: dict[AttemptKey, str] = field(default_factory=dict)
    """Errors with which the API server refuses objects of attempts."""
    restart_stage: str = ""
    """The annotation by which a person asks for a restart."""
    is_deleted: bool = False
    started: list[AttemptSpec] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    now: float = 1000.0
    generation: int = 1
    is_patient: bool = True
    """Time moves on to what the decision waits for when nothing is left to do."""

    def step(self) -> bool:
        """One reconcile, carried out; whether anything was to be done."""
        run = build_run(status=encode_status(self.status), generation=self.generation, **self.spec)
        run = msgspec.structs.replace(run, restart_stage=self.restart_stage)
        seen = observe(
            self.jobs.values(),
            self.pods.values(),
            progress=self.progress,
            progress_errors=self.progress_errors,
            wait_reasons=self.wait_reasons,
            refusals=self.refusals,
        )
        decision = reconcile(run, seen, now=self.now, defaults=DEFAULTS)
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
        if self.is_patient and decision.requeue_at is not None and decision.status is None and not decision.start:
            self.now = max(self.now, decision.requeue_at)
            return False
        return decision != Decision(requeue_at=decision.requeue_at)

    def settle(self) -> StageStatus | None:
        """Reconcile until nothing changes; the stage that is active then."""
        for _ in range(50):
            if not self.step():
                break
        else:
            pytest.fail("the world never settles: a reconcile undoes another")
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
        """What the Job controller, the scheduler and the kubelets do with a Job that isn't suspended."""
        for index in range(job.nodes):
            pod = build_pod(job.stage, job.attempt, index, created=self.now, placed=self.now)
            self.pods[pod.name] = pod

    def hold(self, **fields: Any) -> None:
        """What the cluster does with all pods."""
        self.pods = {n: replace(p, **fields) for n, p in self.pods.items()}
        self.settle()

    def end(self, index: int, exit_code: int, **message: object) -> None:
        """A worker of the active stage ends."""
        pod = next(p for p in self.pods.values() if p.index == index and p.terminated is None)
        end = build_end(exit_code, at=self.now, **message)
        phase = "Failed" if exit_code else "Succeeded"
        self.pods[pod.name] = replace(pod, phase=phase, is_ready=False, terminated=end)

    def succeed(self, stage: StageStatus, **result: object) -> None:
        """All workers of the active stage end well."""
        for pod in [p for p in self.pods.values() if p.stage == stage.name and p.terminated is None]:
            own = {"result": build_result(stage.name, **result)} if pod.index == 0 else {}
            self.end(pod.index, 0, **own)

    def stage(self, name: str) -> StageStatus:
        """A stage's status."""
        return next(s for s in self.status.stages if s.name == name)


def finish(world: World) -> None:
    """Let every stage that comes succeed."""
    while (active := world.settle()) is not None:
        world.succeed(active)
