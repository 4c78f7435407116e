"""Plan a run's stages from its spec alone: their order, what each starts from, its digest and its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, to_builtins

from sailvl_operator.api import names
from sailvl_operator.api.types import Run, Spec, StageSpec, Workers
from sailvl_operator.core import stage_config
from sailvl_operator.core.desired.workload import count_gpus, count_nodes
from sailvl_trainer import contract


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """A stage with everything that follows from the spec alone."""

    stage: StageSpec
    depends_on: tuple[str, ...]
    """Stages that must have succeeded before this one starts."""
    init_from: str | None
    """Training stage whose exported model this stage starts from; None for curation and for the first training."""
    digest: str
    """Hash of everything that changes the stage's result."""
    directory: str
    """Directory of the stage's result, relative to the storage; a reused result may lie elsewhere."""
    workers: Workers
    """Workers of the stage merged over those of the run and the defaults."""
    kind: str
    """Kind of the stage: curate, pretrain, sft or evaluate."""
    nodes: int
    """Number of workers."""
    gpus_per_node: int
    """GPUs of each worker; 0 if it runs on the CPU."""


def plan(run: Run) -> tuple[PlannedStage, ...]:
    """Plan all stages in the order of the spec; a stage's digest includes those of the stages that it reads."""
    planned: list[PlannedStage] = []
    digests: dict[str, str] = {}
    last_trained: str | None = None
    model: dict[str, Any] = to_builtins(stage_config.build_model(run.spec.model, lambda path: path))
    for stage in run.spec.stages:
        init_from = last_trained if stage.init_from is UNSET else stage.init_from
        init_from = None if stage.kind == "curate" else init_from
        digest = digests[stage.name] = _build_digest(run.spec, stage, digests, init_from, model=model)
        if stage.kind == "curate":
            # Curation doesn't use the vision tower; the training stages that read its data include it in their digests.
            digest = _build_digest(run.spec, stage, digests, init_from, model=model | {"vision": None})
        workers = stage_config.merge_workers(run.spec, stage)
        planned.append(
            PlannedStage(
                stage=stage,
                depends_on=_find_dependencies(stage, planned, init_from),
                init_from=init_from,
                digest=digest,
                directory=f"{run.name}/{stage.name}-{digest[: names.DIGEST_LETTERS]}",
                workers=workers,
                kind=stage.kind,
                nodes=count_nodes(workers),
                gpus_per_node=count_gpus(workers),
            )
        )
        if stage.kind in ("pretrain", "sft"):
            last_trained = stage.name
    return tuple(planned)


def _build_digest(
    spec: Spec, stage: StageSpec, digests: Mapping[str, str], init_from: str | None, *, model: dict[str, Any]
) -> str:
    """Hash what changes the stage's result but not where it runs, so that other runs of the same stage share it."""
    settings = stage_config.build_settings(spec, stage, lambda name: f"digest:{digests[name]}", lambda path: path)
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


def _find_dependencies(stage: StageSpec, before: list[PlannedStage], init_from: str | None) -> tuple[str, ...]:
    """Return the stages in `dependsOn`, by default the stage before, and all stages whose results this one reads."""
    named = tuple(p.stage.name for p in before[-1:]) if stage.depends_on is UNSET else stage.depends_on
    training = stage.pretrain if stage.pretrain is not UNSET else stage.sft
    data = () if training is UNSET else tuple(d.from_ for d in training.data if d.from_ is not UNSET)
    init = () if init_from is None else (init_from,)
    return tuple(dict.fromkeys(named + data + init))
