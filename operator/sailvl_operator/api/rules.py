"""The rules that a schema of types can't state, as CEL: each with a message for people and the field that it is about.

Written on the struct whose value is `self`; the API server evaluates them on every write, `sailvl validate` offline.
"""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names, types
from sailvl_operator.api.benchmarks import BENCHMARKS

Rule = dict[str, Any]


def _rule(rule: str, message: str, field: str = "") -> Rule:
    return {"rule": rule, "message": message} | ({"fieldPath": field} if field else {})


def _exactly_one(*fields: str) -> Rule:
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return _rule(f"[{listed}].exists_one(k, k)", f"give exactly one of {', '.join(fields)}")


_TOKENS_OR_EPOCHS = [_exactly_one("tokens", "epochs")]
_BENCHMARKS = ", ".join(f"'{name}'" for name in ("all", *BENCHMARKS))

RULES: dict[type, list[Rule]] = {
    types.Storage: [_exactly_one("volumeClaim", "volumeClaimTemplate")],
    types.EnvFrom: [_exactly_one("secretRef", "configMapRef")],
    types.DataInput: [_exactly_one("from", "path")],
    types.Pretrain: _TOKENS_OR_EPOCHS,
    types.Sft: _TOKENS_OR_EPOCHS,
    types.Gate: [_rule("has(self.atMost) || has(self.atLeast)", "give atMost, atLeast or both")],
    types.Source: [
        _rule("self.format == 'procedural' || has(self.path)", "this format needs path, a place on the storage"),
        _rule("self.format != 'procedural' || !has(self.path)", "procedural draws its pictures: leave path out"),
        _rule("self.format != 'procedural' || has(self.samples)", "procedural needs samples: how many to draw"),
    ],
    types.Evaluate: [
        _rule(
            "(has(self.benchmarks) && self.benchmarks.size() > 0) || (has(self.custom) && self.custom.size() > 0)",
            "give benchmarks, custom or both",
        ),
        _rule(
            f"!has(self.benchmarks) || self.benchmarks.all(b, b in [{_BENCHMARKS}])",
            f"benchmarks are all, {', '.join(BENCHMARKS)}; write others under custom",
        ),
        _rule(
            "!has(self.benchmarks) || self.benchmarks.size() == 0 || has(self.data)",
            "named benchmarks need data: the folder with <name>.tsv",
        ),
    ],
    types.Stage: [_exactly_one("curate", "pretrain", "sft", "evaluate")],
}

_BEFORE = "exists(j, p, j < i && p.name == {name}{more})"


def _names_earlier(field: str, more: str = "") -> str:
    return f"self.all(i, s, !has(s.{field}) || self.{_BEFORE.format(name=f's.{field}', more=more)})"


def _data_from(kind: str) -> str:
    earlier = _BEFORE.format(name="d.from", more=" && has(p.curate)")
    return f"self.all(i, s, !has(s.{kind}) || s.{kind}.data.all(d, !has(d.from) || self.{earlier}))"


STAGES: list[Rule] = [
    _rule(
        f"self.all(i, s, !has(s.dependsOn) || s.dependsOn.all(d, self.{_BEFORE.format(name='d', more='')}))",
        "dependsOn must name stages that come before",
    ),
    _rule(_data_from("pretrain"), "data's from must name a curate stage that comes before"),
    _rule(_data_from("sft"), "data's from must name a curate stage that comes before"),
    _rule(
        _names_earlier("initFrom", " && (has(p.pretrain) || has(p.sft))"),
        "initFrom must name a pretrain or sft stage that comes before",
    ),
    _rule(
        "self.all(i, s, !has(s.evaluate) || self.exists(j, p, j < i && (has(p.pretrain) || has(p.sft))))",
        "an evaluate stage needs a pretrain or sft stage before it",
    ),
    _rule(
        "oldSelf.size() <= self.size() && oldSelf.all(i, o, self[i].name == o.name)",
        "stages keep their order: append new ones at the end",
    ),
]
"""On spec.stages."""

RUN: list[Rule] = [
    _rule(
        f"self.spec.stages.all(s, self.metadata.name.size() + s.name.size() <= {names.MAX_RUN_AND_STAGE})",
        f"metadata.name and a stage's name together have at most {names.MAX_RUN_AND_STAGE} characters",
        ".metadata.name",
    ),
    _rule(
        "!has(oldSelf.status) || !has(oldSelf.status.stages) || oldSelf.spec.stages.all(i, o, "
        "i < self.spec.stages.size() && self.spec.stages[i] == o || "
        "!oldSelf.status.stages.exists(t, t.name == o.name && t.state != 'Pending'))",
        "a stage that has started can't be changed or removed; append a new one",
        ".spec.stages",
    ),
]
"""On the whole object."""
