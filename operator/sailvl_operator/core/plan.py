"""The order of a run's stages: who waits for whom, what each starts from, its digest and its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, to_builtins

from sailvl_operator.api import names
from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.types import Run, Spec, Stage, Workers
from sailvl_operator.core import stage_config
from sailvl_operator.core.decision import Attempt
from sailvl_operator.core.desired.workload import count_gpus
from sailvl_trainer import contract

_SETTINGS_OF_KIND = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """A stage with everything that follows from the spec alone."""

    stage: Stage
    depends_on: tuple[str, ...]
    init_from: str | None
    """The training stage whose export it reads."""
    digest: str
    directory: str
    """Relative to the storage, unless its result is found elsewhere."""
    workers: Workers


def plan(run: Run) -> tuple[PlannedStage, ...]:
    """All stages of a run in the order of the spec; digests chain through what a stage reads."""
    planned: list[PlannedStage] = []
    digests: dict[str, str] = {}
    trained: str | None = None
    model = _cover_model(run.spec)
    for stage in run.spec.stages:
        init_from = trained if stage.init_from is UNSET else stage.init_from
        init_from = None if stage.kind == "curate" else init_from
        digests[stage.name] = _digest(run.spec, stage, digests, init_from, model=model)
        digest = digests[stage.name]
        if stage.kind == "curate":  # it looks at nothing with the model's eyes; those who read it cover them themselves
            digest = _digest(run.spec, stage, digests, init_from, model=model | {"vision": None})
        planned.append(
            PlannedStage(
                stage=stage,
                depends_on=_depends_on(stage, planned, init_from),
                init_from=init_from,
                digest=digest,
                directory=f"{run.name}/{stage.name}-{digest[: names.DIGEST_LETTERS]}",
                workers=stage_config.merge_workers(run.spec, stage),
            )
        )
        if stage.kind in ("pretrain", "sft"):
            trained = stage.name
    return tuple(planned)


def build_attempt(
    run: Run,
    planned: PlannedStage,
    *,
    attempt: int,
    outputs: Mapping[str, str],
    defaults: Defaults,
    avoid_nodes: tuple[str, ...] = (),
    doubted_nodes: tuple[str, ...] = (),
) -> Attempt:
    """What one attempt is told. `outputs`: directories of the stages so far, relative to the storage."""
    spec, policy = run.spec, run.spec.restart_policy
    return Attempt(
        document=_build_document(run, planned, attempt, outputs, defaults),
        workers=planned.workers,
        image=defaults.image if spec.image is UNSET else spec.image,
        image_pull_policy=spec.image_pull_policy,
        in_place_restarts=policy.in_place_restarts,
        stall_timeout_seconds=policy.stall_timeout_seconds,
        grace_seconds=defaults.grace_seconds,
        claim=claim_of(run),
        avoid_nodes=avoid_nodes,
        doubted_nodes=doubted_nodes,
        owner_name=run.name,
        owner_uid=run.uid,
    )


def claim_of(run: Run) -> str:
    """The claim that a run's workers mount: the one it names, or the one made from its template."""
    claim = run.spec.storage.volume_claim
    return names.claim_name(run.name) if claim is UNSET else claim


def _build_document(
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
        **_settings(run.spec, planned.stage, locate, resolve),
    )


def resolve_path(path: str, root: str) -> str:
    """A path of the spec in the worker: /data is the storage, wherever it is mounted; other ids stay as they are."""
    mount = names.STORAGE_MOUNT
    return root + path[len(mount) :] if path == mount or path.startswith(mount + "/") else path


def _settings(spec: Spec, stage: Stage, locate: stage_config.Locate, resolve: stage_config.Resolve) -> dict[str, Any]:
    if stage.curate is not UNSET:
        return {"curate": stage_config.build_curate(stage.curate, resolve)}
    if stage.evaluate is not UNSET:
        return {"evaluate": stage_config.build_evaluate(stage.evaluate, resolve)}
    training = stage.pretrain if stage.pretrain is not UNSET else stage.sft
    assert training is not UNSET, "the schema asks for exactly one kind"
    gpus = count_gpus(stage_config.merge_workers(spec, stage))
    return {
        "train": stage_config.build_train(
            training,
            train=training.train,
            preset=spec.model.preset,
            gpus=gpus,
            locate=locate,
            resolve=resolve,
        )
    }


def _digest(
    spec: Spec, stage: Stage, digests: Mapping[str, str], init_from: str | None, *, model: dict[str, Any]
) -> str:
    """Covers what changes the result, not where it runs: the same stage in another run has the same digest."""
    settings = _settings(spec, stage, lambda name: f"digest:{digests[name]}", lambda path: path)
    covered = {
        "recipe": contract.RECIPE_VERSION,
        "kind": stage.kind,
        "seed": spec.seed,
        "model": model,
        "initFrom": None if init_from is None else digests[init_from],
        "settings": to_builtins(settings),
    }
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _cover_model(spec: Spec) -> dict[str, Any]:
    covered: dict[str, Any] = to_builtins(stage_config.build_model(spec.model, lambda path: path))
    return covered


def _depends_on(stage: Stage, before: list[PlannedStage], init_from: str | None) -> tuple[str, ...]:
    """What it names or else the stage before, and whatever it reads."""
    named = tuple(p.stage.name for p in before[-1:]) if stage.depends_on is UNSET else stage.depends_on
    training = stage.pretrain if stage.pretrain is not UNSET else stage.sft
    read = () if training is UNSET else tuple(d.from_ for d in training.data if d.from_ is not UNSET)
    init = () if init_from is None else (init_from,)
    return tuple(dict.fromkeys(named + read + init))
