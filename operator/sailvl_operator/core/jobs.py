"""Find the Jobs that a decision deletes, and build the attempts whose Jobs it creates.

Jobs are deleted if they are of older attempts or of failed stages, or if no status mentions them. An attempt consists
of the stage config for its workers and of everything that its Job is made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.status import Cause, StageStatus
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.core import stage_config
from sailvl_operator.core.decision import AttemptSpec, Deletion, DeletionMode
from sailvl_operator.core.observe import JobRecord, Observed, has_live_pods
from sailvl_operator.core.plan import PlannedStage
from sailvl_operator.core.restart_policy import find_excluded_nodes
from sailvl_operator.core.stage_view import StageTransition
from sailvl_trainer import contract


def find_deletions(
    stages: Sequence[StageStatus], transitions: Sequence[StageTransition], observed: Observed
) -> tuple[Deletion, ...]:
    """Return the deletions of an active run; `stages` are the stages of the status as it was last written."""
    superseded = [*find_superseded_jobs(stages, observed), *find_lost_jobs(stages, observed)]
    attempts = [t.view.attempt for t in transitions if t.should_delete_job]
    released = [job for a in attempts for job in (a.job or a.gone_job,) if job is not None]
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


def find_lost_jobs(stages: Sequence[StageStatus], observed: Observed) -> list[JobRecord]:
    """Return the Jobs of older attempts that lost their labels, and whose workers still run."""
    current = {stage.name: stage.attempt for stage in stages}
    return [
        attempt.gone_job
        for (stage, number), attempt in observed.attempts.items()
        if attempt.gone_job is not None and number < current.get(stage, 0) and has_live_pods(attempt)
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


def build_attempts(transitions: Sequence[StageTransition]) -> tuple[AttemptSpec, ...]:
    """Build the attempts whose Jobs have to be created."""
    views = [transition.view for transition in transitions]
    outputs = {view.planned.stage.name: view.status.output or view.planned.directory for view in views}
    return tuple(_build_next_attempt(transition, outputs) for transition in transitions if transition.should_start)


def build_attempt(
    run: Run,
    planned: PlannedStage,
    *,
    attempt: int,
    outputs: Mapping[str, str],
    defaults: Defaults,
    excluded_nodes: tuple[str, ...] = (),
    suspect_nodes: tuple[str, ...] = (),
) -> AttemptSpec:
    """Build one attempt of a stage; `outputs` are the directories of all stages, relative to the storage."""
    spec, policy = run.spec, run.spec.restart_policy
    return AttemptSpec(
        document=_build_stage_config(run, planned, attempt, outputs, defaults),
        workers=planned.workers,
        image=defaults.image if spec.image is UNSET else spec.image,
        image_pull_policy=spec.image_pull_policy,
        in_place_restarts=policy.in_place_restarts,
        stall_timeout_seconds=policy.stall_timeout_seconds,
        grace_seconds=defaults.grace_seconds,
        claim=get_claim_name(run),
        excluded_nodes=excluded_nodes,
        suspect_nodes=suspect_nodes,
        owner_name=run.name,
        owner_uid=run.uid,
    )


def get_claim_name(run: Run) -> str:
    """Return the name of the claim that the workers mount: the one in the spec, or the one made from its template."""
    claim = run.spec.storage.volume_claim
    return names.claim_name(run.name) if claim is UNSET else claim


def resolve_path(path: str, root: str) -> str:
    """Translate a path of the spec to one of the worker: /data is wherever the storage is mounted.

    Other paths, and ids of models, stay as they are.
    """
    mount = names.STORAGE_MOUNT
    return root + path[len(mount) :] if path == mount or path.startswith(mount + "/") else path


def _build_next_attempt(transition: StageTransition, outputs: Mapping[str, str]) -> AttemptSpec:
    """Build the attempt of a transition with the digest and directory that its stage started with.

    An edit of the workers, or a newer version of the operator, could plan the stage differently now.
    """
    view, status = transition.view, transition.status
    last = status.last_failure
    excluded = find_excluded_nodes(status, view.run.spec.restart_policy)
    suspects = [last.node] if last is not None and last.cause == Cause.INFRA and last.node else []
    return build_attempt(
        view.run,
        replace(view.planned, digest=status.digest, directory=status.output),
        attempt=status.attempt,
        outputs=outputs,
        defaults=view.defaults,
        excluded_nodes=excluded,
        suspect_nodes=tuple(node for node in suspects if node not in excluded),
    )


def _build_stage_config(
    run: Run, planned: PlannedStage, attempt: int, outputs: Mapping[str, str], defaults: Defaults
) -> contract.Stage:
    root = defaults.storage.rstrip("/")

    def locate(stage: str) -> str:
        return f"{root}/{outputs[stage]}"

    def resolve(path: str) -> str:
        return resolve_path(path, root)

    return contract.Stage(
        namespace=run.namespace,
        run=run.name,
        stage=planned.stage.name,
        kind=planned.stage.kind,
        attempt=attempt,
        digest=planned.digest,
        storage=root,
        output=f"{root}/{planned.directory}",
        seed=run.spec.seed,
        start_timeout_seconds=run.spec.restart_policy.start_timeout_seconds,
        model=stage_config.build_model(run.spec.model, resolve),
        engine=stage_config.build_engine(run.spec.engine if planned.stage.engine is UNSET else planned.stage.engine),
        init_from=None if planned.init_from is None else locate(planned.init_from),
        **stage_config.build_settings(run.spec, planned.stage, locate, resolve),
    )
