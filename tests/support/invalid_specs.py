"""Specs that must be refused, each with the field and the words that tell a user what to write instead.

SCHEMA: by the API server and `sailvl validate` alike; OPERATOR: by the operator, for what isn't built yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.builders.operator import build_document

DROP = object()
"""In place of a value: the field is left out."""

ALIGN = "spec.stages.1.pretrain"
EVALUATE = "spec.stages.3.evaluate"
SOURCE = "spec.stages.0.curate.sources.0"
CLAIM = "spec.storage.volumeClaimTemplate"
ONE_KIND = "give exactly one of curate, pretrain, sft, evaluate"


@dataclass(frozen=True, kw_only=True)
class BadSpec:
    id: str
    changes: dict[str, Any]
    """Value by path; stages and other items by their number."""
    field: str
    words: str

    def build(self) -> dict[str, Any]:
        """The good document, bent."""
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


def _table(*rows: tuple[str, dict[str, Any], str, str]) -> list[BadSpec]:
    return [BadSpec(id=id_, changes=changes, field=field, words=words) for id_, changes, field, words in rows]


SCHEMA = _table(
    # the run
    ("no stages", {"spec.stages": []}, "spec.stages", "at least 1"),
    ("no storage", {"spec.storage": DROP}, "spec.storage", "Required value"),
    ("no model", {"spec.model": DROP}, "spec.model", "Required value"),
    ("empty storage", {"spec.storage": {}}, "spec.storage", "give exactly one of volumeClaim, volumeClaimTemplate"),
    (
        "both kinds of storage",
        {CLAIM: {"resources": {"requests": {"storage": "1Gi"}}}},
        "spec.storage",
        "give exactly one of volumeClaim, volumeClaimTemplate",
    ),
    (
        "a claim without a size",
        {"spec.storage.volumeClaim": DROP, CLAIM: {"resources": {"requests": {}}}},
        "spec.storage.volumeClaimTemplate.resources.requests",
        "requests needs storage",
    ),
    ("a claim in capitals", {"spec.storage.volumeClaim": "Data"}, "spec.storage.volumeClaim", "should match"),
    ("unknown preset", {"spec.model.preset": "huge"}, "spec.model.preset", '"tiny"'),
    ("unknown field", {"spec.model.precision": "fp8"}, "spec.model.precision", "unknown field"),
    ("unknown field in a stage", {f"{ALIGN}.learning_rate": "1"}, "spec.stages[1].pretrain.learning_rate", "unknown"),
    ("a negative seed", {"spec.seed": -1}, "spec.seed", "greater than or equal to 0"),
    ("an empty image", {"spec.image": ""}, "spec.image", "at least 1 chars"),
    ("an unknown policy", {"spec.imagePullPolicy": "Sometimes"}, "spec.imagePullPolicy", '"IfNotPresent"'),
    ("suspend as a word", {"spec.suspend": "yes"}, "spec.suspend", "must be of type boolean"),
    ("a name in capitals", {"metadata.name": "Demo"}, "metadata.name", "should match"),
    ("a name that begins with a digit", {"metadata.name": "2b"}, "metadata.name", "should match"),
    ("a name too long", {"metadata.name": "a" * 41}, "metadata.name", "40"),
    (
        "names too long together",
        {"metadata.name": "a" * 30, "spec.stages.1.name": "b" * 30},
        "metadata.name",
        "at most 52 characters",
    ),
    # workers
    ("no nodes", {"spec.workers.nodes": 0}, "spec.workers.nodes", "greater than or equal to 1"),
    ("too many nodes", {"spec.workers.nodes": 10_000}, "spec.workers.nodes", "less than or equal to 9999"),
    ("nodes as a word", {"spec.workers.nodes": "two"}, "spec.workers.nodes", "must be of type integer"),
    (
        "GPUs as a resource",
        {"spec.workers.resources": {"limits": {"nvidia.com/gpu": "8"}}},
        "spec.workers.resources.limits",
        "as gpusPerNode",
    ),
    (
        "an unknown unit",
        {"spec.workers.resources": {"requests": {"memory": "64GB"}}},
        "spec.workers.resources.requests.memory",
        "should match",
    ),
    (
        "a quantity as a number",
        {"spec.workers.resources": {"requests": {"cpu": 4}}},
        "spec.workers.resources.requests.cpu",
        "must be of type string",
    ),
    (
        "the operator's variable",
        {"spec.workers.env": [{"name": "SAILVL_NODES", "value": "1"}]},
        "spec.workers.env[0].name",
        "names that begin with SAILVL_ are the operator's",
    ),
    (
        "a variable twice",
        {"spec.workers.env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        "spec.workers.env[1]",
        "Duplicate value",
    ),
    ("a variable with a space", {"spec.workers.env": [{"name": "A B"}]}, "spec.workers.env[0].name", "should match"),
    (
        "a secret and a config map in one",
        {"spec.workers.envFrom": [{"secretRef": {"name": "a"}, "configMapRef": {"name": "a"}}]},
        "spec.workers.envFrom[0]",
        "give exactly one of secretRef, configMapRef",
    ),
    (
        "the operator's label",
        {"spec.workers.labels": {"sailvl.dev/run": "other"}},
        "spec.workers.labels",
        "labels that begin with sailvl.dev/ are the operator's",
    ),
    (
        "an unknown effect",
        {"spec.workers.tolerations": [{"operator": "Exists", "effect": "Run"}]},
        "spec.workers.tolerations[0].effect",
        '"NoSchedule"',
    ),
    ("an unknown engine", {"spec.engine": {"name": "horovod"}}, "spec.engine.name", '"deepspeed"'),
    ("ZeRO stage 4", {"spec.engine": {"zeroStage": 4}}, "spec.engine.zeroStage", "less than or equal to 3"),
    (
        "restarts without end",
        {"spec.restartPolicy": {"maxRestarts": -1}},
        "spec.restartPolicy.maxRestarts",
        "greater than or equal to 0",
    ),
    # stages
    (
        "two kinds in a stage",
        {"spec.stages.1.sft": {"data": [{"path": "/data/x"}], "epochs": "1"}},
        "spec.stages[1]",
        ONE_KIND,
    ),
    ("no kind in a stage", {ALIGN: DROP}, "spec.stages[1]", ONE_KIND),
    ("capitals in a stage's name", {"spec.stages.1.name": "Align"}, "spec.stages[1].name", "should match"),
    ("a stage without a name", {"spec.stages.1.name": DROP}, "spec.stages[1].name", "Required value"),
    ("a stage's name twice", {"spec.stages.1.name": "curate"}, "spec.stages[1]", "Duplicate value"),
    (
        "dependsOn a later stage",
        {"spec.stages.1.dependsOn": ["evaluate"]},
        "spec.stages",
        "stage alignment: dependsOn must name stages that come before",
    ),
    (
        "dependsOn itself",
        {"spec.stages.1.dependsOn": ["alignment"]},
        "spec.stages",
        "stage alignment: dependsOn must name stages that come before",
    ),
    (
        "dependsOn twice the same",
        {"spec.stages.1.dependsOn": ["curate", "curate"]},
        "spec.stages[1].dependsOn[1]",
        "Duplicate value",
    ),
    (
        "initFrom a curate stage",
        {"spec.stages.1.initFrom": "curate"},
        "spec.stages",
        "stage alignment: initFrom must name a pretrain or sft stage that comes before",
    ),
    (
        "initFrom of a curate stage",
        {
            "spec.stages.3": {
                "name": "again",
                "initFrom": "knowledge",
                "curate": {"sources": [{"format": "procedural", "samples": 1}]},
            }
        },
        "spec.stages",
        "stage again: a curate stage has no weights",
    ),
    (
        "nothing trained before an evaluation",
        {
            "spec.stages.1": DROP,
            "spec.stages.1.sft": DROP,
            "spec.stages.1.curate": {"sources": [{"format": "procedural", "samples": 1}]},
        },
        "spec.stages",
        "stage evaluate: an evaluate stage needs a pretrain or sft stage before it",
    ),
    # training
    (
        "data from a later stage",
        {f"{ALIGN}.data": [{"from": "evaluate"}]},
        "spec.stages",
        "stage alignment: from must name a curate stage that comes before",
    ),
    (
        "data from a training stage",
        {"spec.stages.2.sft.data": [{"from": "alignment"}]},
        "spec.stages",
        "stage knowledge: from must name a curate stage that comes before",
    ),
    (
        "data from and path",
        {f"{ALIGN}.data": [{"from": "curate", "path": "/data/x"}]},
        "spec.stages[1].pretrain.data[0]",
        "give exactly one of from, path",
    ),
    ("a relative path", {f"{ALIGN}.data": [{"path": "x"}]}, "spec.stages[1].pretrain.data[0].path", "should match"),
    ("no data", {f"{ALIGN}.data": []}, "spec.stages[1].pretrain.data", "at least 1"),
    ("tokens and epochs", {f"{ALIGN}.epochs": "1"}, "spec.stages[1].pretrain", "give exactly one of tokens, epochs"),
    (
        "neither tokens nor epochs",
        {f"{ALIGN}.tokens": DROP},
        "spec.stages[1].pretrain",
        "give exactly one of tokens, epochs",
    ),
    ("no tokens", {f"{ALIGN}.tokens": "0"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("an unknown suffix", {f"{ALIGN}.tokens": "131G"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("no epochs", {"spec.stages.2.sft.epochs": "0"}, "spec.stages[2].sft.epochs", "epochs must be more than 0"),
    (
        "a float as learning rate",
        {f"{ALIGN}.learningRate": 2e-4},
        "spec.stages[1].pretrain.learningRate",
        "must be of type string",
    ),
    (
        "words as learning rate",
        {f"{ALIGN}.learningRate": "fast"},
        "spec.stages[1].pretrain.learningRate",
        "should match",
    ),
    (
        "no learning rate",
        {f"{ALIGN}.learningRate": "0.0"},
        "spec.stages[1].pretrain.learningRate",
        "learningRate must be more than 0",
    ),
    ("all of it warm-up", {f"{ALIGN}.warmup": "1.0"}, "spec.stages[1].pretrain.warmup", "less than 1"),
    ("an unknown part", {f"{ALIGN}.train": ["head"]}, "spec.stages[1].pretrain.train[0]", '"connector"'),
    (
        "a part twice",
        {f"{ALIGN}.train": ["connector", "connector"]},
        "spec.stages[1].pretrain.train[1]",
        "Duplicate value",
    ),
    # curation
    ("a folder without a path", {f"{SOURCE}.path": DROP}, "spec.stages[0].curate.sources[0]", "needs path"),
    (
        "drawn pictures without a number",
        {SOURCE: {"format": "procedural"}},
        "spec.stages[0].curate.sources[0]",
        "procedural needs samples",
    ),
    (
        "drawn pictures with a path",
        {SOURCE: {"format": "procedural", "samples": 9, "path": "/data/x"}},
        "spec.stages[0].curate.sources[0]",
        "leave path out",
    ),
    ("an unknown format", {f"{SOURCE}.format": "zip"}, "spec.stages[0].curate.sources[0].format", '"webdataset"'),
    (
        "all of it held out",
        {"spec.stages.0.curate.heldOutFraction": "1"},
        "spec.stages[0].curate.heldOutFraction",
        "less than 1",
    ),
    (
        "a server without a scheme",
        {"spec.stages.0.curate.judge": {"server": "judge:8000"}},
        "spec.stages[0].curate.judge.server",
        "should match",
    ),
    # evaluation
    (
        "an unknown benchmark",
        {EVALUATE: {"benchmarks": ["MMStar", "MMFoo"], "data": "/data/b"}},
        "spec.stages[3].evaluate.benchmarks",
        "MMFoo: benchmarks are all, MMStar",
    ),
    ("benchmarks without data", {EVALUATE: {"benchmarks": ["all"]}}, "spec.stages[3].evaluate", "need data"),
    ("nothing to evaluate", {EVALUATE: {}}, "spec.stages[3].evaluate", "give benchmarks, custom or both"),
    (
        "an unknown metric",
        {f"{EVALUATE}.custom.0.metric": "bleu"},
        "spec.stages[3].evaluate.custom[0].metric",
        '"exact_match"',
    ),
    (
        "a gate without a bound",
        {"spec.stages.1.gate": {"metric": "heldOutLoss"}},
        "spec.stages[1].gate",
        "give atMost, atLeast or both",
    ),
)

OPERATOR = _table(
    ("another engine", {"spec.engine": {"name": "fsdp2"}}, "spec.engine.name", "write deepspeed"),
    ("another ZeRO stage", {"spec.engine": {"zeroStage": 3}}, "spec.engine.zeroStage", "write 1"),
    ("a stage's engine", {"spec.stages.1.engine": {"name": "fsdp2"}}, "spec.stages[1].engine.name", "write deepspeed"),
    ("adalrs", {f"{ALIGN}.schedule": "adalrs"}, "spec.stages[1].pretrain.schedule", "write cosine"),
    ("adalrs in sft", {"spec.stages.2.sft.schedule": "adalrs"}, "spec.stages[2].sft.schedule", "write cosine"),
    ("parquet", {f"{SOURCE}.format": "parquet"}, "spec.stages[0].curate.sources[0].format", "write imagefolder"),
    ("jsonl", {f"{SOURCE}.format": "jsonl"}, "spec.stages[0].curate.sources[0].format", "write imagefolder"),
    (
        "captions",
        {"spec.stages.0.curate.caption": {"mode": "recaption"}},
        "spec.stages[0].curate.caption.mode",
        "write keep",
    ),
    ("a judge", {"spec.stages.0.curate.judge": {"model": "/data/j"}}, "spec.stages[0].curate.judge", "leave it out"),
    ("balance", {"spec.stages.0.curate.balance": {}}, "spec.stages[0].curate.balance", "leave it out"),
)
