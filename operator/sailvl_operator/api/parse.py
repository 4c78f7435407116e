"""A SailVLRun as the API server holds it, or as a file has it, parsed once into its typed form."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.types import Run, Spec


class SpecError(ValueError):
    """The spec does not fit its types; the message names the field."""


def parse_run(raw: Mapping[str, Any]) -> Run:
    """Raises SpecError for a spec that the types don't allow."""
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
    return renew_run(run, raw)


def renew_run(run: Run, raw: Mapping[str, Any]) -> Run:
    """The same run of the same generation as it is now."""
    metadata = raw["metadata"]
    return msgspec.structs.replace(
        run,
        resource_version=metadata.get("resourceVersion", ""),
        deleting="deletionTimestamp" in metadata,
        status=dict(raw.get("status") or {}),
        restart_stage=(metadata.get("annotations") or {}).get(names.ANNOTATION_RESTART, ""),
    )


def parse_spec(spec: Mapping[str, Any]) -> Spec:
    """Raises SpecError that names the field, as in `spec.stages[0].name`."""
    try:
        return msgspec.convert(dict(spec), Spec)
    except msgspec.ValidationError as error:
        words = str(error)
        text, _, path = words.partition(" - at `$")
        raise SpecError(f"spec{path.rstrip('`')}: {text}") from error
