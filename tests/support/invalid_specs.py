"""Invalid specs, each with the field and a part of the error message that validation must report.

RUN_SCHEMA, and the stages of invalid_stages.py, are rejected by the API server and `sailvl validate` alike, UNSUPPORTED
by the operator and `sailvl validate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.builders.operator import build_document

DROP = object()
"""Value of a change that removes the field."""

ALIGN = "spec.stages.1.pretrain"
SOURCE = "spec.stages.0.curate.sources.0"
CLAIM = "spec.storage.volumeClaimTemplate"


@dataclass(frozen=True, kw_only=True)
class InvalidSpec:
    """A valid document with changes that make it invalid."""

    id: str
    changes: dict[str, Any]
    """New value by path; list items are addressed by their index."""
    field: str
    """Path of the field that the error names."""
    message: str
    """Part of the expected error message."""

    def build(self) -> dict[str, Any]:
        """Return the valid document with the changes applied."""
        document = build_document()
        for path, value in self.changes.items():
            _change(document, path.split("."), value)
        return document


def _change(document: Any, path: list[str], value: Any) -> None:
    *parents, last = path
    at = document
    for part in parents:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    key: Any = int(last) if last.isdigit() else last
    if value is DROP:
        del at[key]
    else:
        at[key] = value


def build_table(*rows: tuple[str, dict[str, Any], str, str]) -> list[InvalidSpec]:
    """Build invalid specs from rows of id, changes, field and message."""
    return [InvalidSpec(id=id_, changes=changes, field=field, message=message) for id_, changes, field, message in rows]


RUN_SCHEMA = build_table(
    # the run
    ("no stages", {"spec.stages": []}, "spec.stages", "at least 1"),
    ("no storage", {"spec.storage": DROP}, "spec.storage", "Required value"),
    ("no model", {"spec.model": DROP}, "spec.model", "Required value"),
    (
        "storage without a claim",
        {"spec.storage": {}},
        "spec.storage",
        "exactly one of volumeClaim, volumeClaimTemplate must be set",
    ),
    (
        "volumeClaim and volumeClaimTemplate",
        {CLAIM: {"resources": {"requests": {"storage": "1Gi"}}}},
        "spec.storage",
        "exactly one of volumeClaim, volumeClaimTemplate must be set",
    ),
    (
        "claim without a size",
        {"spec.storage.volumeClaim": DROP, CLAIM: {"resources": {"requests": {}}}},
        "spec.storage.volumeClaimTemplate.resources.requests",
        "storage, the size of the claim, is required",
    ),
    ("uppercase claim name", {"spec.storage.volumeClaim": "Data"}, "spec.storage.volumeClaim", "should match"),
    ("unknown preset", {"spec.model.preset": "huge"}, "spec.model.preset", '"tiny"'),
    ("unknown field", {"spec.model.precision": "fp8"}, "spec.model.precision", "unknown field"),
    ("unknown field in a stage", {f"{ALIGN}.learning_rate": "1"}, "spec.stages[1].pretrain.learning_rate", "unknown"),
    ("negative seed", {"spec.seed": -1}, "spec.seed", "greater than or equal to 0"),
    ("empty image", {"spec.image": ""}, "spec.image", "at least 1 chars"),
    ("unknown pull policy", {"spec.imagePullPolicy": "Sometimes"}, "spec.imagePullPolicy", '"IfNotPresent"'),
    ("suspend is a string", {"spec.suspend": "yes"}, "spec.suspend", "must be of type boolean"),
    ("uppercase run name", {"metadata.name": "Demo"}, "metadata.name", "should match"),
    ("run name begins with a digit", {"metadata.name": "2b"}, "metadata.name", "should match"),
    ("run name with a line break", {"metadata.name": "demo\n"}, "metadata.name", "should match"),
    ("stage name with a line break", {"spec.stages.1.name": "align\n"}, "spec.stages[1].name", "should match"),
    (
        "count with a line break",
        {"spec.stages.1.pretrain.tokens": "32K\n"},
        "spec.stages[1].pretrain.tokens",
        "should match",
    ),
    ("image with a letter that reverses text", {"spec.image": "trainer\u202e:1"}, "spec.image", "should match"),
    ("image with a line break", {"spec.image": "trainer:1\n"}, "spec.image", "should match"),
    (
        "path with a NUL",
        {"spec.stages.0.curate.sources.0.path": "/data/\0"},
        "spec.stages[0].curate.sources[0].path",
        "should match",
    ),
    ("run name too long", {"metadata.name": "a" * 41}, "metadata.name", "40"),
    (
        "run and stage name too long together",
        {"metadata.name": "a" * 30, "spec.stages.1.name": "b" * 30},
        "metadata.name",
        "at most 52 characters",
    ),
    # workers
    ("zero nodes", {"spec.workers.nodes": 0}, "spec.workers.nodes", "greater than or equal to 1"),
    ("too many nodes", {"spec.workers.nodes": 10_000}, "spec.workers.nodes", "less than or equal to 9999"),
    ("nodes is a string", {"spec.workers.nodes": "two"}, "spec.workers.nodes", "must be of type integer"),
    (
        "GPUs as a resource limit",
        {"spec.workers.resources": {"limits": {"nvidia.com/gpu": "8"}}},
        "spec.workers.resources.limits",
        "set gpusPerNode instead",
    ),
    (
        "unknown quantity suffix",
        {"spec.workers.resources": {"requests": {"memory": "64GB"}}},
        "spec.workers.resources.requests.memory",
        "should match",
    ),
    (
        "quantity is a number",
        {"spec.workers.resources": {"requests": {"cpu": 4}}},
        "spec.workers.resources.requests.cpu",
        "must be of type string",
    ),
    (
        "reserved variable name",
        {"spec.workers.env": [{"name": "SAILVL_NODES", "value": "1"}]},
        "spec.workers.env[0].name",
        "names that begin with SAILVL_ are reserved for the operator",
    ),
    (
        "duplicate variable",
        {"spec.workers.env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        "spec.workers.env[1]",
        "Duplicate value",
    ),
    ("variable name with a space", {"spec.workers.env": [{"name": "A B"}]}, "spec.workers.env[0].name", "should match"),
    (
        "secretRef and configMapRef",
        {"spec.workers.envFrom": [{"secretRef": {"name": "a"}, "configMapRef": {"name": "a"}}]},
        "spec.workers.envFrom[0]",
        "exactly one of secretRef, configMapRef must be set",
    ),
    (
        "reserved label",
        {"spec.workers.labels": {"sailvl.dev/run": "other"}},
        "spec.workers.labels",
        "labels that begin with sailvl.dev/",
    ),
    *(
        (
            f"label of another controller: {label}",
            {"spec.workers.labels": {label: "x"}},
            "spec.workers.labels",
            "reserved",
        )
        for label in (
            "batch.kubernetes.io/job-name",
            "kueue.x-k8s.io/queue-name",
            "app.kubernetes.io/managed-by",
            "job-name",
            "controller-uid",
        )
    ),
    (
        "unknown taint effect",
        {"spec.workers.tolerations": [{"operator": "Exists", "effect": "Run"}]},
        "spec.workers.tolerations[0].effect",
        '"NoSchedule"',
    ),
    ("unknown engine", {"spec.engine": {"name": "horovod"}}, "spec.engine.name", '"deepspeed"'),
    ("ZeRO stage 4", {"spec.engine": {"zeroStage": 4}}, "spec.engine.zeroStage", "less than or equal to 3"),
    (
        "negative restart budget",
        {"spec.restartPolicy": {"maxRestarts": -1}},
        "spec.restartPolicy.maxRestarts",
        "greater than or equal to 0",
    ),
)

UNSUPPORTED = build_table(
    ("unsupported engine", {"spec.engine": {"name": "fsdp2"}}, "spec.engine.name", "set it to deepspeed"),
    ("unsupported ZeRO stage", {"spec.engine": {"zeroStage": 3}}, "spec.engine.zeroStage", "set it to 1"),
    (
        "unsupported engine of a stage",
        {"spec.stages.1.engine": {"name": "fsdp2"}},
        "spec.stages[1].engine.name",
        "set it to deepspeed",
    ),
    (
        "unsupported schedule in pretrain",
        {f"{ALIGN}.schedule": "adalrs"},
        "spec.stages[1].pretrain.schedule",
        "set it to cosine",
    ),
    (
        "unsupported schedule in sft",
        {"spec.stages.2.sft.schedule": "adalrs"},
        "spec.stages[2].sft.schedule",
        "set it to cosine",
    ),
    (
        "unsupported format parquet",
        {f"{SOURCE}.format": "parquet"},
        "spec.stages[0].curate.sources[0].format",
        "set it to imagefolder",
    ),
    (
        "unsupported format jsonl",
        {f"{SOURCE}.format": "jsonl"},
        "spec.stages[0].curate.sources[0].format",
        "set it to imagefolder",
    ),
    (
        "unsupported caption mode",
        {"spec.stages.0.curate.caption": {"mode": "recaption"}},
        "spec.stages[0].curate.caption.mode",
        "set it to keep",
    ),
    (
        "unsupported judge",
        {"spec.stages.0.curate.judge": {"model": "/data/j"}},
        "spec.stages[0].curate.judge",
        "remove the field",
    ),
    ("unsupported balance", {"spec.stages.0.curate.balance": {}}, "spec.stages[0].curate.balance", "remove the field"),
)
