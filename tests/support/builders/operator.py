"""Builders of the operator's test objects: a valid run, and the records of its Jobs and pods."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.types import Run, Spec
from sailvl_operator.core.observe import JobRecord, PodRecord, Terminated
from sailvl_operator.core.reports import build_terminated

SPEC: dict[str, Any] = {
    "image": "registry.example.com/sailvl-trainer:0.1.0",
    "storage": {"volumeClaim": "sail-data"},
    "model": {"preset": "tiny"},
    "workers": {"nodes": 2, "gpusPerNode": 0},
    "stages": [
        {
            "name": "curate",
            "workers": {"nodes": 1},
            "curate": {"sources": [{"format": "imagefolder", "path": "/data/raw/stamps"}]},
        },
        {"name": "alignment", "pretrain": {"train": ["connector"], "data": [{"from": "curate"}], "tokens": "32K"}},
        {"name": "knowledge", "sft": {"data": [{"path": "/data/sft/knowledge"}], "epochs": "1"}},
        {
            "name": "evaluate",
            "workers": {"nodes": 1},
            "evaluate": {
                "custom": [{"name": "colours", "path": "/data/benchmarks/colours.tsv", "metric": "exact_match"}]
            },
        },
    ],
}


def build_document(**spec: Any) -> dict[str, Any]:
    """Build a valid SailVLRun as a user writes it; `spec` replaces fields of its spec."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "demo", "namespace": "team"},
        "spec": copy.deepcopy(SPEC) | spec,
    }


def build_run(*, status: dict[str, Any] | None = None, generation: int = 1, **spec: Any) -> Run:
    """Build a valid run as the operator parses it; `spec` replaces fields of its spec."""
    return Run(
        namespace="team",
        name="demo",
        uid="run-uid",
        generation=generation,
        resource_version="1",
        created=0.0,
        deleting=False,
        spec=msgspec.convert(copy.deepcopy(SPEC) | spec, Spec),
        status=status or {},
    )


def build_job(stage: str, attempt: int = 1, *, nodes: int = 1, **fields: Any) -> JobRecord:
    """Build the record of an attempt's Job."""
    name = names.job_name("demo", stage, attempt)
    known = {"uid": f"uid-{name}", "owner_uid": "run-uid", "nodes": nodes, "created": 0.0}
    known["started"] = fields.get("created", 0.0)
    return JobRecord(namespace="team", name=name, run="demo", stage=stage, attempt=attempt, **(known | fields))


def build_pod(stage: str, attempt: int = 1, index: int = 0, **fields: Any) -> PodRecord:
    """Build the record of a running pod; `fields` replace its fields."""
    name = f"{names.job_name('demo', stage, attempt)}-{index}"
    known = {"phase": "Running", "is_ready": True, "placed": 1.0, "node": f"node-{index}", "uid": f"uid-{name}"}
    return PodRecord(
        namespace="team", name=name, run="demo", stage=stage, attempt=attempt, index=index, **(known | fields)
    )


def build_end(exit_code: int, *, at: float = 0.0, reason: str = "", **message: Any) -> Terminated:
    """Build the terminated state of a worker; `message` are fields of its termination message."""
    text = json.dumps({"exit_code": exit_code, **message})
    return build_terminated(exit_code=exit_code, reason=reason, message=text, finished=at)


def build_result(stage: str, **fields: Any) -> dict[str, Any]:
    """Build a stage's result as a termination message contains it."""
    kind = {"curate": "curate", "alignment": "pretrain", "knowledge": "sft"}.get(stage, "evaluate")
    return {"stage": stage, "kind": kind, "digest": "d", "attempt": 1, "output": f"demo/{stage}-found"} | fields
