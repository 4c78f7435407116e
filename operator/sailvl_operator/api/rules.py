"""Validation rules in CEL for what an OpenAPI schema can't express, each with its message and field path.

A rule belongs to the struct whose value is `self`. The API server evaluates the rules on every write; `sailvl validate`
evaluates them offline, except transition rules, which refer to `oldSelf`.
"""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names, stages, types, workers
from sailvl_operator.api.benchmarks import BENCHMARKS

Rule = dict[str, Any]


def _rule(rule: str, message: str, field: str = "", expression: str = "") -> Rule:
    """Build a validation rule; `expression` is a CEL expression for a message that contains the invalid value."""
    known = {"rule": rule, "message": message, "messageExpression": expression, "fieldPath": field}
    return {key: value for key, value in known.items() if value}


def _exactly_one(*fields: str) -> Rule:
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return _rule(f"[{listed}].exists_one(k, k)", f"exactly one of {', '.join(fields)} must be set")


def _compare_number(field: str, comparison: str, message: str) -> Rule:
    """Build a rule on a decimal string. Strings that aren't numbers pass, because the pattern already rejects them."""
    is_number = f"self.{field}.matches('^[0-9]+([.][0-9]+)?(e-?[0-9]+)?$')"
    return _rule(f"!has(self.{field}) || !{is_number} || double(self.{field}) {comparison}", message, f".{field}")


def _positive(field: str) -> Rule:
    return _compare_number(field, "> 0.0", "must be greater than 0")


def _less_than_one(field: str) -> Rule:
    return _compare_number(field, "< 1.0", "must be less than 1")


def _gate_needs_held_out_samples(kind: str) -> Rule:
    has_held_out_gate = "has(self.gate) && self.gate.metric.startsWith('heldOutLoss')"
    return _rule(
        f"!(has(self.{kind}) && self.{kind}.heldOutSamples == 0 && {has_held_out_gate})",
        "the gate needs a held-out loss; set heldOutSamples to more than 0",
        f".{kind}.heldOutSamples",
    )


_TRAINING = [
    _exactly_one("tokens", "epochs"),
    _positive("epochs"),
    _positive("learningRate"),
    _positive("clipNorm"),
    _less_than_one("warmup"),
]
_GPU = "nvidia.com/gpu"
_RESERVED_LABEL = " || ".join(
    [f"k.startsWith('{prefix}')" for prefix in names.RESERVED_LABEL_PREFIXES]
    + [f"k == '{label}'" for label in names.RESERVED_LABELS]
)
"""CEL expression that holds if `k` is the key of a label that users may not set."""
_BENCHMARK_NAMES = ", ".join(f"'{name}'" for name in ("all", *BENCHMARKS))
_UNKNOWN_BENCHMARK = f"unknown benchmark; use all, {', '.join(BENCHMARKS)}, or define it under custom"

RULES: dict[type, list[Rule]] = {
    types.Storage: [_exactly_one("volumeClaim", "volumeClaimTemplate")],
    types.VolumeClaimResources: [
        _rule("'storage' in self.requests", "storage, the size of the claim, is required", ".requests")
    ],
    workers.EnvFrom: [_exactly_one("secretRef", "configMapRef")],
    workers.EnvVar: [
        _rule(
            "!self.name.startsWith('SAILVL_')", "names that begin with SAILVL_ are reserved for the operator", ".name"
        )
    ],
    workers.Resources: [
        _rule(
            f"!has(self.{kind}) || !('{_GPU}' in self.{kind})",
            f"{_GPU} must not be set here; set gpusPerNode instead",
            f".{kind}",
        )
        for kind in ("requests", "limits")
    ],
    workers.Workers: [
        _rule(
            f"!has(self.labels) || !self.labels.exists(k, {_RESERVED_LABEL})",
            f"labels that begin with {', '.join(names.RESERVED_LABEL_PREFIXES)}, and "
            f"{', '.join(names.RESERVED_LABELS)}, are reserved for the operator, the Job controller and Kueue",
            ".labels",
        )
    ],
    stages.DataInput: [_exactly_one("from", "path")],
    stages.Pretrain: _TRAINING,
    stages.Sft: _TRAINING,
    types.Gate: [_rule("has(self.atMost) || has(self.atLeast)", "at least one of atMost, atLeast must be set")],
    stages.Source: [
        _rule("self.format == 'procedural' || has(self.path)", "path is required for this format"),
        _rule("self.format != 'procedural' || !has(self.path)", "path must not be set for the format procedural"),
        _rule("self.format != 'procedural' || has(self.samples)", "samples is required for the format procedural"),
    ],
    stages.Curate: [_less_than_one("heldOutFraction")],
    stages.Evaluate: [
        _rule(
            "(has(self.benchmarks) && self.benchmarks.size() > 0) || (has(self.custom) && self.custom.size() > 0)",
            "at least one of benchmarks, custom must be set",
        ),
        _rule(
            f"!has(self.benchmarks) || self.benchmarks.all(b, b in [{_BENCHMARK_NAMES}])",
            _UNKNOWN_BENCHMARK,
            ".benchmarks",
            f"self.benchmarks.filter(b, !(b in [{_BENCHMARK_NAMES}]))[0] + ': {_UNKNOWN_BENCHMARK}'",
        ),
        _rule(
            "!has(self.benchmarks) || self.benchmarks.size() == 0 || has(self.data)",
            "data, the directory with <name>.tsv, is required if benchmarks is set",
        ),
    ],
    types.StageSpec: [
        _exactly_one("curate", "pretrain", "sft", "evaluate"),
        _gate_needs_held_out_samples("pretrain"),
        _gate_needs_held_out_samples("sft"),
    ],
}

OFFLINE: dict[str, str] = {}
"""Equivalent for celpy by expression. celpy lacks two-variable comprehensions, so `validation.py` adds an index to each
item."""

_SERVER = {"each": "i, s", "earlier": "j, p, j < i", "first": "transformList(i, s, {wrong}, s.name)[0]"}
_PYTHON = {"each": "s", "earlier": "p, p.x_index < s.x_index", "first": "filter(s, {wrong})[0].name"}


def _each_stage(wrong: str, message: str) -> Rule:
    """Build a rule on all stages.

    `wrong` is a CEL expression that holds for an invalid stage `s`; in it, `<earlier>` stands for the beginning of a
    comprehension over the stages `p` before `s`.
    """

    def rule(dialect: dict[str, str]) -> str:
        return f"self.all({dialect['each']}, !({wrong.replace('<earlier>', dialect['earlier'])}))"

    def expression(dialect: dict[str, str]) -> str:
        first = dialect["first"].format(wrong=wrong.replace("<earlier>", dialect["earlier"]))
        return f"'stage ' + self.{first} + ': {message}'"

    OFFLINE[rule(_SERVER)], OFFLINE[expression(_SERVER)] = rule(_PYTHON), expression(_PYTHON)
    return _rule(rule(_SERVER), message, expression=expression(_SERVER))


def _data_from(kind: str) -> Rule:
    known = "self.exists(<earlier> && p.name == d.from && has(p.curate))"
    return _each_stage(
        f"has(s.{kind}) && s.{kind}.data.exists(d, has(d.from) && !{known})",
        "data[].from must name an earlier curate stage",
    )


STAGES: list[Rule] = [
    _each_stage(
        "has(s.dependsOn) && s.dependsOn.exists(d, !self.exists(<earlier> && p.name == d))",
        "dependsOn must name earlier stages",
    ),
    _data_from("pretrain"),
    _data_from("sft"),
    _each_stage(
        "has(s.initFrom) && !self.exists(<earlier> && p.name == s.initFrom && (has(p.pretrain) || has(p.sft)))",
        "initFrom must name an earlier pretrain or sft stage",
    ),
    _each_stage(
        "has(s.initFrom) && has(s.curate)",
        "initFrom must not be set for a curate stage",
    ),
    _each_stage(
        "has(s.evaluate) && !self.exists(<earlier> && (has(p.pretrain) || has(p.sft)))",
        "an evaluate stage requires an earlier pretrain or sft stage",
    ),
    _rule(
        "oldSelf.size() <= self.size() && oldSelf.all(i, o, self[i].name == o.name)",
        "stages can't be removed, renamed or reordered; append new stages at the end",
    ),
]
"""Rules on spec.stages."""

_NO_STATUS = "!has(oldSelf.status) || !has(oldSelf.status.stages)"
_IMMUTABLE = ("dependsOn", "initFrom", "curate", "pretrain", "sft", "evaluate")
"""Fields of a started stage that can't change, because they determine its result. Workers, engine and gate may change
and take effect at the next attempt."""


def _differs(field: str) -> str:
    now = "self.spec.stages[i]"
    return f"has({now}.{field}) != has(o.{field}) || has(o.{field}) && {now}.{field} != o.{field}"


_CHANGED = (
    "oldSelf.status.stages.exists(t, t.name == o.name && t.state != 'Pending') && "
    "(i >= self.spec.stages.size() || self.spec.stages[i].name != o.name || "
    f"{' || '.join(_differs(field) for field in _IMMUTABLE)})"
)
_STARTED = "stages are immutable once started; append a new stage"


def _immutable_once_started(field: str) -> Rule:
    started = "oldSelf.status.stages.exists(t, t.state != 'Pending')"
    return _rule(
        f"{_NO_STATUS} || self.spec.{field} == oldSelf.spec.{field} || !{started}",
        f"{field} is immutable once a stage has started; create a new run",
        f".spec.{field}",
    )


RUN: list[Rule] = [
    _rule(
        f"self.spec.stages.all(s, self.metadata.name.size() + s.name.size() <= {names.MAX_RUN_AND_STAGE})",
        f"metadata.name and the name of a stage may have at most {names.MAX_RUN_AND_STAGE} characters in total",
        ".metadata.name",
    ),
    _rule(
        f"{_NO_STATUS} || oldSelf.spec.stages.all(i, o, !({_CHANGED}))",
        _STARTED,
        ".spec.stages",
        f"'stage ' + oldSelf.spec.stages.transformList(i, o, {_CHANGED}, o.name)[0] + ': {_STARTED}'",
    ),
    *(_immutable_once_started(field) for field in ("storage", "model", "seed")),
]
"""Rules on the whole object."""
