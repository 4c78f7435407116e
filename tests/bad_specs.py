"""Specs that must be refused, each with the field and the words that tell a user what to write instead.

`where`: who refuses it: the schema (API server and `sailvl validate`), or the operator for what isn't built yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from builders import build_document

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BadSpec:
    id: str
    bend: Callable[[Document], object]
    field: str
    words: str
    where: Literal["schema", "operator"] = "schema"

    def build(self) -> Document:
        """The good document, bent."""
        document = build_document()
        self.bend(document)
        return document


def _set(path: str, value: Any) -> Callable[[Document], None]:
    """Set a field by its path; stages by their number."""

    def bend(document: Document) -> None:
        at: Any = document
        *parents, last = path.split(".")
        for part in parents:
            at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
        at[int(last) if last.isdigit() else last] = value

    return bend


def _drop(path: str) -> Callable[[Document], None]:
    def bend(document: Document) -> None:
        at: Any = document
        *parents, last = path.split(".")
        for part in parents:
            at = at[int(part)] if part.isdigit() else at[part]
        del at[last]

    return bend


_ALIGNMENT = "spec.stages.1.pretrain"

BAD_SPECS = [
    BadSpec(id="no stages", bend=_set("spec.stages", []), field="spec.stages", words=""),
    BadSpec(id="no storage", bend=_drop("spec.storage"), field="spec.storage", words="Required"),
    BadSpec(id="empty storage", bend=_set("spec.storage", {}), field="spec.storage", words="give exactly one of"),
    BadSpec(
        id="both kinds of storage",
        bend=_set("spec.storage.volumeClaimTemplate", {"resources": {"requests": {"storage": "1Gi"}}}),
        field="spec.storage",
        words="give exactly one of volumeClaim, volumeClaimTemplate",
    ),
    BadSpec(id="unknown preset", bend=_set("spec.model.preset", "huge"), field="spec.model.preset", words="tiny"),
    BadSpec(
        id="unknown field",
        bend=_set("spec.model.precision", "fp8"),
        field="spec.model.precision",
        words="unknown field",
    ),
    BadSpec(
        id="two kinds in a stage",
        bend=_set("spec.stages.1.evaluate", {"custom": []}),
        field="spec.stages[1]",
        words="give exactly one of",
    ),
    BadSpec(id="no kind in a stage", bend=_drop(_ALIGNMENT), field="spec.stages[1]", words="give exactly one of"),
    BadSpec(id="capitals in a name", bend=_set("spec.stages.1.name", "Align"), field="spec.stages[1].name", words=""),
    BadSpec(id="a name twice", bend=_set("spec.stages.1.name", "curate"), field="spec.stages", words="uplicate"),
    BadSpec(
        id="dependsOn a later stage",
        bend=_set("spec.stages.1.dependsOn", ["evaluate"]),
        field="spec.stages",
        words="dependsOn must name stages that come before",
    ),
    BadSpec(
        id="data from a later stage",
        bend=_set(f"{_ALIGNMENT}.data", [{"from": "evaluate"}]),
        field="spec.stages",
        words="must name a curate stage that comes before",
    ),
    BadSpec(
        id="data from a training stage",
        bend=_set("spec.stages.2.sft.data", [{"from": "alignment"}]),
        field="spec.stages",
        words="must name a curate stage that comes before",
    ),
    BadSpec(
        id="initFrom a curate stage",
        bend=_set("spec.stages.1.initFrom", "curate"),
        field="spec.stages",
        words="initFrom must name a pretrain or sft stage that comes before",
    ),
    BadSpec(
        id="data from and path",
        bend=_set(f"{_ALIGNMENT}.data", [{"from": "curate", "path": "/data/x"}]),
        field="spec.stages[1].pretrain.data[0]",
        words="give exactly one of from, path",
    ),
    BadSpec(id="no data", bend=_set(f"{_ALIGNMENT}.data", []), field="spec.stages[1].pretrain.data", words=""),
    BadSpec(
        id="tokens and epochs",
        bend=_set(f"{_ALIGNMENT}.epochs", "1"),
        field="spec.stages[1].pretrain",
        words="give exactly one of tokens, epochs",
    ),
    BadSpec(
        id="neither tokens nor epochs",
        bend=_drop(f"{_ALIGNMENT}.tokens"),
        field="spec.stages[1].pretrain",
        words="give exactly one of tokens, epochs",
    ),
    BadSpec(
        id="a float as learning rate",
        bend=_set(f"{_ALIGNMENT}.learningRate", 2e-4),
        field="spec.stages[1].pretrain.learningRate",
        words="string",
    ),
    BadSpec(
        id="words as learning rate",
        bend=_set(f"{_ALIGNMENT}.learningRate", "fast"),
        field="spec.stages[1].pretrain.learningRate",
        words="",
    ),
    BadSpec(
        id="an unknown suffix of a count",
        bend=_set(f"{_ALIGNMENT}.tokens", "131G"),
        field="spec.stages[1].pretrain.tokens",
        words="",
    ),
    BadSpec(
        id="a part that does not exist",
        bend=_set(f"{_ALIGNMENT}.train", ["head"]),
        field="spec.stages[1].pretrain.train[0]",
        words="connector",
    ),
    BadSpec(id="no nodes", bend=_set("spec.workers.nodes", 0), field="spec.workers.nodes", words="1"),
    BadSpec(id="nodes as a word", bend=_set("spec.workers.nodes", "two"), field="spec.workers.nodes", words="integer"),
    BadSpec(id="negative GPUs", bend=_set("spec.workers.gpusPerNode", -1), field="spec.workers.gpusPerNode", words="0"),
    BadSpec(
        id="an image folder without a path",
        bend=_drop("spec.stages.0.curate.sources.0.path"),
        field="spec.stages[0].curate.sources[0]",
        words="this format needs path",
    ),
    BadSpec(
        id="drawn pictures without a number",
        bend=_set("spec.stages.0.curate.sources", [{"format": "procedural"}]),
        field="spec.stages[0].curate.sources[0]",
        words="procedural needs samples",
    ),
    BadSpec(
        id="an unknown format",
        bend=_set("spec.stages.0.curate.sources.0.format", "zip"),
        field="spec.stages[0].curate.sources[0].format",
        words="webdataset",
    ),
    BadSpec(
        id="an unknown benchmark",
        bend=_set("spec.stages.3.evaluate", {"benchmarks": ["MMFoo"], "data": "/data/b"}),
        field="spec.stages[3].evaluate",
        words="benchmarks are all, MMStar",
    ),
    BadSpec(
        id="named benchmarks without data",
        bend=_set("spec.stages.3.evaluate", {"benchmarks": ["all"]}),
        field="spec.stages[3].evaluate",
        words="named benchmarks need data",
    ),
    BadSpec(
        id="nothing to evaluate",
        bend=_set("spec.stages.3.evaluate", {}),
        field="spec.stages[3].evaluate",
        words="give benchmarks, custom or both",
    ),
    BadSpec(
        id="a gate without a bound",
        bend=_set("spec.stages.1.gate", {"metric": "heldOutLoss"}),
        field="spec.stages[1].gate",
        words="give atMost, atLeast or both",
    ),
    BadSpec(
        id="names too long together",
        bend=lambda d: (_set("metadata.name", "a" * 30)(d), _set("spec.stages.1.name", "b" * 30)(d)),
        field="metadata.name",
        words="at most 52 characters",
    ),
    BadSpec(
        id="another engine",
        bend=_set("spec.engine", {"name": "fsdp2"}),
        field="spec.engine.name",
        words="write deepspeed",
        where="operator",
    ),
    BadSpec(
        id="another ZeRO stage",
        bend=_set("spec.engine", {"zeroStage": 3}),
        field="spec.engine.zeroStage",
        words="write 1",
        where="operator",
    ),
    BadSpec(
        id="adalrs",
        bend=_set(f"{_ALIGNMENT}.schedule", "adalrs"),
        field="spec.stages[1].pretrain.schedule",
        words="write cosine",
        where="operator",
    ),
    BadSpec(
        id="a judge",
        bend=_set("spec.stages.0.curate.judge", {"model": "/data/judge"}),
        field="spec.stages[0].curate.judge",
        words="leave it out",
        where="operator",
    ),
    BadSpec(
        id="a gate",
        bend=_set("spec.stages.1.gate", {"metric": "heldOutLoss", "atMost": "2.1"}),
        field="spec.stages[1].gate",
        words="leave it out",
        where="operator",
    ),
]
