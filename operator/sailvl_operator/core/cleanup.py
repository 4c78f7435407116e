"""Find the Jobs that have to be deleted: those of older attempts, of failed stages, and those no status mentions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sailvl_operator.api.status import StageStatus
from sailvl_operator.core.decision import Deletion, DeletionMode
from sailvl_operator.core.observe import JobRecord, Observed
from sailvl_operator.core.stage_view import StageTransition


def find_deletions(
    stages: Sequence[StageStatus], transitions: Sequence[StageTransition], observed: Observed
) -> tuple[Deletion, ...]:
    """Return the deletions of an active run; `stages` are the stages of the status as it was last written."""
    superseded = find_superseded_jobs(stages, observed)
    released = [t.view.attempt.job for t in transitions if t.should_delete_job and t.view.attempt.job is not None]
    return (
        *build_deletions(DeletionMode.BEFORE_STARTS, (job for job in superseded if not _is_dead(job, observed))),
        *build_deletions(DeletionMode.FORCE, (job for job in superseded if _is_dead(job, observed))),
        *build_deletions(DeletionMode.GRACEFUL, released),
    )


def build_deletions(mode: DeletionMode, jobs: Iterable[JobRecord]) -> tuple[Deletion, ...]:
    """Build the deletions of several Jobs in one mode."""
    return tuple(Deletion(job=job, mode=mode) for job in jobs)


def find_superseded_jobs(stages: Sequence[StageStatus], observed: Observed) -> list[JobRecord]:
    """Return the Jobs of older attempts and of failed stages; their hung ranks would hold GPUs."""
    current = {stage.name: stage for stage in stages}
    return [
        job
        for job in observed.jobs
        if not job.is_deleting
        and job.stage in current
        and (job.attempt < current[job.stage].attempt or current[job.stage].state == "Failed")
    ]


def find_suspended_jobs(stages: Sequence[StageStatus], observed: Observed) -> list[JobRecord]:
    """Return the Jobs of stages that were suspended because their run failed; their workers save a checkpoint."""
    jobs = (observed.get(stage.name, stage.attempt).job for stage in stages if stage.state == "Suspended")
    return [job for job in jobs if job is not None and not job.is_deleting]


def find_unrecorded_jobs(stages: Sequence[StageStatus], observed: Observed) -> list[JobRecord]:
    """Return first Jobs that no status mentions: the run ended or was rejected just after they were created."""
    recorded = {stage.name for stage in stages if stage.attempt > 0}
    return [job for job in observed.jobs if job.stage not in recorded and not job.is_deleting]


def _is_dead(job: JobRecord, observed: Observed) -> bool:
    """Return whether the workers of a Job can't run together any more: one is lost, and no queue restarts the Job."""
    pods = observed.get(job.stage, job.attempt).pods
    return not job.queue and any(pod.is_gone or pod.terminated is not None for pod in pods)
