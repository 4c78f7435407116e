"""What the schema has and this version doesn't do yet: refused with the field's path and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET

from sailvl_operator.api.types import Curate, Engine, Spec, Stage

Problem = tuple[str, str]
"""Path of the field, and what to write instead."""

_CAPTION = "not supported yet; write keep, or leave caption out: the alt-text stays the caption"


def unsupported(spec: Spec) -> tuple[Problem, ...]:
    """Every field of a spec that this version can't carry out."""
    return tuple(_of_spec(spec))


def _of_spec(spec: Spec) -> Iterator[Problem]:
    yield from _of_engine("spec.engine", spec.engine)
    for index, stage in enumerate(spec.stages):
        yield from _of_stage(f"spec.stages[{index}]", stage)


def _of_stage(path: str, stage: Stage) -> Iterator[Problem]:
    if stage.engine is not UNSET:
        yield from _of_engine(f"{path}.engine", stage.engine)
    for kind in ("pretrain", "sft"):
        training = getattr(stage, kind)
        if training is not UNSET and training.schedule != "cosine":
            yield f"{path}.{kind}.schedule", f"{training.schedule} is not supported yet; write cosine"
    if stage.curate is not UNSET:
        yield from _of_curate(f"{path}.curate", stage.curate)


def _of_engine(path: str, engine: Engine) -> Iterator[Problem]:
    if engine.name != "deepspeed":
        yield f"{path}.name", f"{engine.name} is not supported yet; write deepspeed"
    if engine.zero_stage != 1:
        yield f"{path}.zeroStage", f"{engine.zero_stage} is not supported yet; write 1"


def _of_curate(path: str, curate: Curate) -> Iterator[Problem]:
    for index, source in enumerate(curate.sources):
        if source.format in ("parquet", "jsonl"):
            yield (
                f"{path}.sources[{index}].format",
                f"{source.format} is not supported yet; write imagefolder or webdataset",
            )
    if curate.caption.mode != "keep":
        yield f"{path}.caption.mode", f"{curate.caption.mode} is {_CAPTION}"
    for name in ("judge", "balance"):
        if getattr(curate, name) is not UNSET:
            yield f"{path}.{name}", "not supported yet; leave it out"
