"""Parses a SailVLRun, from the API server or from a file, into its typed form."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.types import Run, Spec


class SpecError(ValueError):
    """The spec does not match its types. The message begins with the path of the field."""


def parse_run(raw: Mapping[str, Any]) -> Run:
    """Parse a SailVLRun. Raises SpecError if the spec does not match its types."""
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
        restart_stage=(metadata.get("annotations") or {}).get(names.ANNOTATION_RESTART, ""),
    )


def parse_spec(spec: Mapping[str, Any]) -> Spec:
    """Parse a spec. Raises SpecError, whose message begins with the path of the field, as in `spec.stages[0].name`."""
    try:
        return msgspec.convert(dict(spec), Spec)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise SpecError(f"spec{path.rstrip('`')}: {text}") from error
