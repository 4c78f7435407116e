"""The rules that a schema of types can't state, as CEL: each with a message for people and the field that it is about.

Written on the struct whose value is `self`; the API server evaluates them on every write, `sailvl validate` offline.
"""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names, types, workers
from sailvl_operator.api.benchmarks import BENCHMARKS

Rule = dict[str, Any]


def _rule(rule: str, message: str, field: str = "", expression: str = "") -> Rule:
    """`expression` says the message with the values at fault in it."""
    known = {"rule": rule, "message": message, "messageExpression": expression, "fieldPath": field}
    return {key: value for key, value in known.items() if value}


def _exactly_one(*fields: str) -> Rule:
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return _rule(f"[{listed}].exists_one(k, k)", f"give exactly one of {', '.join(fields)}")


def _number(field: str, holds: str, message: str) -> Rule:
    """What is no number is the pattern's to refuse, and only its."""
    is_number = f"self.{field}.matches('^[0-9]+([.][0-9]+)?(e-?[0-9]+)?$')"
    return _rule(f"!has(self.{field}) || !{is_number} || double(self.{field}) {holds}", message, f".{field}")


def _more_than_nothing(field: str) -> Rule:
    return _number(field, "> 0.0", f"{field} must be more than 0")


def _part_of_one(field: str) -> Rule:
    return _number(field, "< 1.0", f"{field} is a part of the whole: less than 1")


_TRAINING = [
    _exactly_one("tokens", "epochs"),
    _more_than_nothing("epochs"),
    _more_than_nothing("learningRate"),
    _more_than_nothing("clipNorm"),
    _part_of_one("warmup"),
]
_GPU = "nvidia.com/gpu"
_KNOWN = ", ".join(f"'{name}'" for name in ("all", *BENCHMARKS))
_LISTED = f"benchmarks are all, {', '.join(BENCHMARKS)}; write others under custom"

RULES: dict[type, list[Rule]] = {
    types.Storage: [_exactly_one("volumeClaim", "volumeClaimTemplate")],
    types.VolumeClaimResources: [
        _rule("'storage' in self.requests", "requests needs storage: the claim's size", ".requests")
    ],
    workers.EnvFrom: [_exactly_one("secretRef", "configMapRef")],
    workers.EnvVar: [
        _rule("!self.name.startsWith('SAILVL_')", "names that begin with SAILVL_ are the operator's", ".name")
    ],
    workers.Resources: [
        _rule(
            f"!has(self.{kind}) || !('{_GPU}' in self.{kind})",
            f"leave {_GPU} out and write the number as gpusPerNode",
            f".{kind}",
        )
        for kind in ("requests", "limits")
    ],
    workers.Workers: [
        _rule(
            f"!has(self.labels) || !self.labels.exists(k, k.startsWith('{names.GROUP}/'))",
            f"labels that begin with {names.GROUP}/ are the operator's",
            ".labels",
        )
    ],
    types.DataInput: [_exactly_one("from", "path")],
    types.Pretrain: _TRAINING,
    types.Sft: _TRAINING,
    types.Gate: [_rule("has(self.atMost) || has(self.atLeast)", "give atMost, atLeast or both")],
    types.Source: [
        _rule("self.format == 'procedural' || has(self.path)", "this format needs path, a place on the storage"),
        _rule("self.format != 'procedural' || !has(self.path)", "procedural draws its pictures: leave path out"),
        _rule("self.format != 'procedural' || has(self.samples)", "procedural needs samples: how many to draw"),
    ],
    types.Curate: [_part_of_one("heldOutFraction")],
    types.Evaluate: [
        _rule(
            "(has(self.benchmarks) && self.benchmarks.size() > 0) || (has(self.custom) && self.custom.size() > 0)",
            "give benchmarks, custom or both",
        ),
        _rule(
            f"!has(self.benchmarks) || self.benchmarks.all(b, b in [{_KNOWN}])",
            _LISTED,
            ".benchmarks",
            f"self.benchmarks.filter(b, !(b in [{_KNOWN}]))[0] + ': {_LISTED}'",
        ),
        _rule(
            "!has(self.benchmarks) || self.benchmarks.size() == 0 || has(self.data)",
            "named benchmarks need data: the folder with <name>.tsv",
        ),
    ],
    types.Stage: [_exactly_one("curate", "pretrain", "sft", "evaluate")],
}

OFFLINE: dict[str, str] = {}
"""The same expression for CEL in Python, which has no comprehensions of two variables: its items know their index."""

_SERVER = {"each": "i, s", "earlier": "j, p, j < i", "first": "transformList(i, s, {wrong}, s.name)[0]"}
_PYTHON = {"each": "s", "earlier": "p, p.x_index < s.x_index", "first": "filter(s, {wrong})[0].name"}


def _each_stage(wrong: str, message: str) -> Rule:
    """A rule on all stages; `wrong` says what must not be of the stage `s`, `<earlier>` begins those `p` before it."""

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
        "from must name a curate stage that comes before",
    )


STAGES: list[Rule] = [
    _each_stage(
        "has(s.dependsOn) && s.dependsOn.exists(d, !self.exists(<earlier> && p.name == d))",
        "dependsOn must name stages that come before",
    ),
    _data_from("pretrain"),
    _data_from("sft"),
    _each_stage(
        "has(s.initFrom) && !self.exists(<earlier> && p.name == s.initFrom && (has(p.pretrain) || has(p.sft)))",
        "initFrom must name a pretrain or sft stage that comes before",
    ),
    _each_stage(
        "has(s.initFrom) && has(s.curate)",
        "a curate stage has no weights to start from; leave initFrom out",
    ),
    _each_stage(
        "has(s.evaluate) && !self.exists(<earlier> && (has(p.pretrain) || has(p.sft)))",
        "an evaluate stage needs a pretrain or sft stage before it",
    ),
    _rule(
        "oldSelf.size() <= self.size() && oldSelf.all(i, o, self[i].name == o.name)",
        "stages keep their order: append new ones at the end",
    ),
]
"""On spec.stages."""

_NO_STATUS = "!has(oldSelf.status) || !has(oldSelf.status.stages)"
_KEPT = ("dependsOn", "initFrom", "curate", "pretrain", "sft", "evaluate")
"""What changes a stage's result. Workers, engine and gate of a started stage may change: the next attempt has them."""


def _differs(field: str) -> str:
    now = "self.spec.stages[i]"
    return f"has({now}.{field}) != has(o.{field}) || has(o.{field}) && {now}.{field} != o.{field}"


_CHANGED = (
    "oldSelf.status.stages.exists(t, t.name == o.name && t.state != 'Pending') && "
    "(i >= self.spec.stages.size() || self.spec.stages[i].name != o.name || "
    f"{' || '.join(_differs(field) for field in _KEPT)})"
)
_STAYS = "a stage that has started stays as it is; append a new one"


def _kept_once_started(field: str) -> Rule:
    started = "oldSelf.status.stages.exists(t, t.state != 'Pending')"
    return _rule(
        f"{_NO_STATUS} || self.spec.{field} == oldSelf.spec.{field} || !{started}",
        f"{field} can't change once a stage has started; create another run",
        f".spec.{field}",
    )


RUN: list[Rule] = [
    _rule(
        f"self.spec.stages.all(s, self.metadata.name.size() + s.name.size() <= {names.MAX_RUN_AND_STAGE})",
        f"metadata.name and a stage's name together have at most {names.MAX_RUN_AND_STAGE} characters",
        ".metadata.name",
    ),
    _rule(
        f"{_NO_STATUS} || oldSelf.spec.stages.all(i, o, !({_CHANGED}))",
        _STAYS,
        ".spec.stages",
        f"'stage ' + oldSelf.spec.stages.transformList(i, o, {_CHANGED}, o.name)[0] + ': {_STAYS}'",
    ),
    *(_kept_once_started(field) for field in ("storage", "model", "seed")),
]
"""On the whole object."""
