"""Invalid specs, each with the field and a part of the error message that validation must report.

SCHEMA is rejected by the API server and `sailvl validate` alike, UNSUPPORTED by the operator and `sailvl validate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.builders.operator import build_document

DROP = object()
"""Value of a change that removes the field."""

ALIGN = "spec.stages.1.pretrain"
EVALUATE = "spec.stages.3.evaluate"
SOURCE = "spec.stages.0.curate.sources.0"
CLAIM = "spec.storage.volumeClaimTemplate"
JUDGE = "spec.stages[0].curate.judge.server"
ONE_KIND = "exactly one of curate, pretrain, sft, evaluate must be set"


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


def _table(*rows: tuple[str, dict[str, Any], str, str]) -> list[InvalidSpec]:
    return [InvalidSpec(id=id_, changes=changes, field=field, message=message) for id_, changes, field, message in rows]


SCHEMA = _table(
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
    # stages
    (
        "stage with two kinds",
        {"spec.stages.1.sft": {"data": [{"path": "/data/x"}], "epochs": "1"}},
        "spec.stages[1]",
        ONE_KIND,
    ),
    ("stage without a kind", {ALIGN: DROP}, "spec.stages[1]", ONE_KIND),
    ("uppercase stage name", {"spec.stages.1.name": "Align"}, "spec.stages[1].name", "should match"),
    ("stage without a name", {"spec.stages.1.name": DROP}, "spec.stages[1].name", "Required value"),
    ("duplicate stage name", {"spec.stages.1.name": "curate"}, "spec.stages[1]", "Duplicate value"),
    (
        "dependsOn a later stage",
        {"spec.stages.1.dependsOn": ["evaluate"]},
        "spec.stages",
        "stage alignment: dependsOn must name earlier stages",
    ),
    (
        "dependsOn itself",
        {"spec.stages.1.dependsOn": ["alignment"]},
        "spec.stages",
        "stage alignment: dependsOn must name earlier stages",
    ),
    (
        "dependsOn with duplicates",
        {"spec.stages.1.dependsOn": ["curate", "curate"]},
        "spec.stages[1].dependsOn[1]",
        "Duplicate value",
    ),
    (
        "initFrom names a curate stage",
        {"spec.stages.1.initFrom": "curate"},
        "spec.stages",
        "stage alignment: initFrom must name an earlier pretrain or sft stage",
    ),
    (
        "initFrom in a curate stage",
        {
            "spec.stages.3": {
                "name": "again",
                "initFrom": "knowledge",
                "curate": {"sources": [{"format": "procedural", "samples": 1}]},
            }
        },
        "spec.stages",
        "stage again: initFrom must not be set for a curate stage",
    ),
    (
        "evaluate without a training stage",
        {
            "spec.stages.1": DROP,
            "spec.stages.1.sft": DROP,
            "spec.stages.1.curate": {"sources": [{"format": "procedural", "samples": 1}]},
        },
        "spec.stages",
        "stage evaluate: an evaluate stage requires an earlier pretrain or sft stage",
    ),
    # training
    (
        "data from a later stage",
        {f"{ALIGN}.data": [{"from": "evaluate"}]},
        "spec.stages",
        "stage alignment: data[].from must name an earlier curate stage",
    ),
    (
        "data from a training stage",
        {"spec.stages.2.sft.data": [{"from": "alignment"}]},
        "spec.stages",
        "stage knowledge: data[].from must name an earlier curate stage",
    ),
    (
        "data from and path",
        {f"{ALIGN}.data": [{"from": "curate", "path": "/data/x"}]},
        "spec.stages[1].pretrain.data[0]",
        "exactly one of from, path must be set",
    ),
    ("relative path", {f"{ALIGN}.data": [{"path": "x"}]}, "spec.stages[1].pretrain.data[0].path", "should match"),
    ("no data", {f"{ALIGN}.data": []}, "spec.stages[1].pretrain.data", "at least 1"),
    (
        "tokens and epochs",
        {f"{ALIGN}.epochs": "1"},
        "spec.stages[1].pretrain",
        "exactly one of tokens, epochs must be set",
    ),
    (
        "neither tokens nor epochs",
        {f"{ALIGN}.tokens": DROP},
        "spec.stages[1].pretrain",
        "exactly one of tokens, epochs must be set",
    ),
    ("zero tokens", {f"{ALIGN}.tokens": "0"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("count below 1", {f"{ALIGN}.batchTokens": "0.0000000001K"}, "spec.stages[1].pretrain.batchTokens", "should match"),
    (
        "count above 64 bits",
        {f"{ALIGN}.tokens": "9999999999999.9T"},
        "spec.stages[1].pretrain.tokens",
        "should match",
    ),
    ("unknown count suffix", {f"{ALIGN}.tokens": "131G"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("zero epochs", {"spec.stages.2.sft.epochs": "0"}, "spec.stages[2].sft.epochs", "must be greater than 0"),
    (
        "learning rate is a float",
        {f"{ALIGN}.learningRate": 2e-4},
        "spec.stages[1].pretrain.learningRate",
        "must be of type string",
    ),
    (
        "learning rate is not a number",
        {f"{ALIGN}.learningRate": "fast"},
        "spec.stages[1].pretrain.learningRate",
        "should match",
    ),
    (
        "zero learning rate",
        {f"{ALIGN}.learningRate": "0.0"},
        "spec.stages[1].pretrain.learningRate",
        "must be greater than 0",
    ),
    ("warm-up fraction of 1", {f"{ALIGN}.warmup": "1.0"}, "spec.stages[1].pretrain.warmup", "less than 1"),
    ("unknown model part", {f"{ALIGN}.train": ["head"]}, "spec.stages[1].pretrain.train[0]", '"connector"'),
    (
        "duplicate model part",
        {f"{ALIGN}.train": ["connector", "connector"]},
        "spec.stages[1].pretrain.train[1]",
        "Duplicate value",
    ),
    # curation
    (
        "imagefolder without a path",
        {f"{SOURCE}.path": DROP},
        "spec.stages[0].curate.sources[0]",
        "path is required for this format",
    ),
    (
        "procedural without samples",
        {SOURCE: {"format": "procedural"}},
        "spec.stages[0].curate.sources[0]",
        "samples is required for the format procedural",
    ),
    (
        "procedural with a path",
        {SOURCE: {"format": "procedural", "samples": 9, "path": "/data/x"}},
        "spec.stages[0].curate.sources[0]",
        "path must not be set for the format procedural",
    ),
    ("unknown source format", {f"{SOURCE}.format": "zip"}, "spec.stages[0].curate.sources[0].format", '"webdataset"'),
    (
        "held-out fraction of 1",
        {"spec.stages.0.curate.heldOutFraction": "1"},
        "spec.stages[0].curate.heldOutFraction",
        "less than 1",
    ),
    (
        "server URL without a scheme",
        {"spec.stages.0.curate.judge": {"server": "judge:8000"}},
        "spec.stages[0].curate.judge.server",
        "should match",
    ),
    *(
        (f"server URL with {what}", {"spec.stages.0.curate.judge": {"server": url}}, JUDGE, "should match")
        for what, url in (
            ("a user name", "http://user:secret@judge"),
            ("a backslash", "http://judge\\@evil"),
            ("a line break", "http://judge\n"),
            ("no host", "http:///v1"),
        )
    ),
    # evaluation
    (
        "unknown benchmark",
        {EVALUATE: {"benchmarks": ["MMStar", "MMFoo"], "data": "/data/b"}},
        "spec.stages[3].evaluate.benchmarks",
        "MMFoo: unknown benchmark; use all, MMStar",
    ),
    (
        "benchmarks without data",
        {EVALUATE: {"benchmarks": ["all"]}},
        "spec.stages[3].evaluate",
        "is required if benchmarks is set",
    ),
    (
        "evaluate without benchmarks",
        {EVALUATE: {}},
        "spec.stages[3].evaluate",
        "at least one of benchmarks, custom must be set",
    ),
    (
        "unknown metric",
        {f"{EVALUATE}.custom.0.metric": "bleu"},
        "spec.stages[3].evaluate.custom[0].metric",
        '"exact_match"',
    ),
    (
        "gate on a held-out loss that is not measured",
        {f"{ALIGN}.heldOutSamples": 0, "spec.stages.1.gate": {"metric": "heldOutLoss", "atMost": "2"}},
        "spec.stages[1].pretrain.heldOutSamples",
        "the gate needs a held-out loss; set heldOutSamples to more than 0",
    ),
    (
        "gate without a bound",
        {"spec.stages.1.gate": {"metric": "heldOutLoss"}},
        "spec.stages[1].gate",
        "at least one of atMost, atLeast must be set",
    ),
)

UNSUPPORTED = _table(
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
