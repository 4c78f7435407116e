"""Parses a SailVLRun, from the API server or from a file, into its typed form.

A spec that parses may still set fields of the schema that this version doesn't support. Callers reject such a run with
the paths that `find_unsupported_fields` returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.stages import Curate
from sailvl_operator.api.types import EngineSpec, Run, Spec, StageSpec
from sailvl_operator.api.untrusted import clean_line

Problem = tuple[str, str]
"""Path of the field and the error message."""

MAX_SPEC_BYTES = 256 * 1024
"""Largest spec as JSON. The schema alone would allow several megabytes, which the operator holds for every run."""
_CAPTION = "not supported yet; set it to keep or remove caption to use the alt-text"

MAX_ANNOTATION_LENGTH = 1024


class SpecError(ValueError):
    """The spec does not match its types. The message begins with the path of the field."""


def parse_run(raw: Mapping[str, Any]) -> Run:
    """Parse a SailVLRun. Raises SpecError if the spec does not match its types."""
    check_spec_size(raw.get("spec_bytes", 0))
    metadata = raw["metadata"]
    created = metadata.get("creationTimestamp")
    run = Run(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        resource_version="",
        created=datetime.fromisoformat(created).timestamp() if created else 0.0,
        deleting=False,
        spec=parse_spec(raw.get("spec") or {}),
        status={},
    )
    return refresh_run(run, raw)


def refresh_run(run: Run, raw: Mapping[str, Any]) -> Run:
    """Return a run of the same generation with the metadata and status of a newer object; the spec is not parsed
    again."""
    metadata = raw["metadata"]
    return msgspec.structs.replace(
        run,
        resource_version=metadata.get("resourceVersion", ""),
        deleting="deletionTimestamp" in metadata,
        status=dict(raw.get("status") or {}),
        restart_stage=clean_line(
            (metadata.get("annotations") or {}).get(names.ANNOTATION_RESTART, ""), MAX_ANNOTATION_LENGTH
        ),
    )


def check_spec_size(size: int) -> None:
    """Raise SpecError if a spec has too many bytes as JSON."""
    if size > MAX_SPEC_BYTES:
        raise SpecError(
            f"spec: has {size} bytes as JSON, and may have at most {MAX_SPEC_BYTES}; set workers.env once for all "
            "stages instead of in each, or divide the stages into several runs"
        )


def parse_spec(spec: Mapping[str, Any] | msgspec.Raw) -> Spec:
    """Parse a spec, decoded or as JSON. Raises SpecError, whose message begins with the path of the field, as in
    `spec.stages[0].name`."""
    content = memoryview(spec) if isinstance(spec, msgspec.Raw) else msgspec.json.encode(spec)
    check_spec_size(len(content))
    try:
        if isinstance(spec, msgspec.Raw):
            return msgspec.json.decode(content, type=Spec)
        return msgspec.convert(dict(spec), Spec)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise SpecError(f"spec{path.rstrip('`')}: {text}") from error


def find_unsupported_fields(spec: Spec) -> tuple[Problem, ...]:
    """Return every field of a spec whose value this version doesn't support."""
    return tuple(_unsupported_in_spec(spec))


def _unsupported_in_spec(spec: Spec) -> Iterator[Problem]:
    yield from _unsupported_in_engine("spec.engine", spec.engine)
    for index, stage in enumerate(spec.stages):
        yield from _unsupported_in_stage(f"spec.stages[{index}]", stage)


def _unsupported_in_stage(path: str, stage: StageSpec) -> Iterator[Problem]:
    if stage.engine is not UNSET:
        yield from _unsupported_in_engine(f"{path}.engine", stage.engine)
    for kind in ("pretrain", "sft"):
        training = getattr(stage, kind)
        if training is not UNSET and training.schedule != "cosine":
            yield f"{path}.{kind}.schedule", f"{training.schedule} is not supported yet; set it to cosine"
    if stage.curate is not UNSET:
        yield from _unsupported_in_curate(f"{path}.curate", stage.curate)


def _unsupported_in_engine(path: str, engine: EngineSpec) -> Iterator[Problem]:
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
