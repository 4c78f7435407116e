"""Fields of the schema that this version doesn't support yet; a run that sets one is rejected with its path."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET

from sailvl_operator.api.curation import Curate
from sailvl_operator.api.types import Engine, Spec, Stage

Problem = tuple[str, str]
"""Path of the field and the error message."""

_CAPTION = "not supported yet; set it to keep or remove caption to use the alt-text"


def find_unsupported_fields(spec: Spec) -> tuple[Problem, ...]:
    """Return every field of a spec whose value this version doesn't support."""
    return tuple(_unsupported_in_spec(spec))


def _unsupported_in_spec(spec: Spec) -> Iterator[Problem]:
    yield from _unsupported_in_engine("spec.engine", spec.engine)
    for index, stage in enumerate(spec.stages):
        yield from _unsupported_in_stage(f"spec.stages[{index}]", stage)


def _unsupported_in_stage(path: str, stage: Stage) -> Iterator[Problem]:
    if stage.engine is not UNSET:
        yield from _unsupported_in_engine(f"{path}.engine", stage.engine)
    for kind in ("pretrain", "sft"):
        training = getattr(stage, kind)
        if training is not UNSET and training.schedule != "cosine":
            yield f"{path}.{kind}.schedule", f"{training.schedule} is not supported yet; set it to cosine"
    if stage.curate is not UNSET:
        yield from _unsupported_in_curate(f"{path}.curate", stage.curate)


def _unsupported_in_engine(path: str, engine: Engine) -> Iterator[Problem]:
    if engine.name != "deepspeed":
        yield f"{path}.name", f"{engine.name} is not supported yet; set it to deepspeed"
    if engine.zero_stage != 1:
        yield f"{path}.zeroStage", f"{engine.zero_stage} is not supported yet; set it to 1"


def _unsupported_in_curate(path: str, curate: Curate) -> Iterator[Problem]:
    for index, source in enumerate(curate.sources):
        if source.format in ("parquet", "jsonl"):
            yield (
                f"{path}.sources[{index}].format",
                f"{source.format} is not supported yet; set it to imagefolder, webdataset or procedural",
            )
    if curate.caption.mode != "keep":
        yield f"{path}.caption.mode", f"{curate.caption.mode} is {_CAPTION}"
    for name in ("judge", "balance"):
        if getattr(curate, name) is not UNSET:
            yield f"{path}.{name}", "not supported yet; remove the field"
