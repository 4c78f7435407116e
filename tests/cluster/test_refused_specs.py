"""The API server rejects the same specs as `sailvl validate`, with the same fields and messages."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.api.validation import validate
from tests.support.builders.operator import build_document
from tests.support.invalid_specs import RUN_SCHEMA, UNSUPPORTED, InvalidSpec
from tests.support.invalid_stages import STAGE_SCHEMA

pytestmark = pytest.mark.cluster

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/run.yaml"))
Kubectl = Callable[..., subprocess.CompletedProcess[str]]
FIELD = re.compile(r"^(?:\* |The SailVLRun .* is invalid: )([a-zA-Z][\w.\[\]]*): ", re.MULTILINE)
UNKNOWN = re.compile(r'unknown field "([^"]+)"')


def _try_create(kubectl: Kubectl, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    metadata = {"name": document["metadata"]["name"], "namespace": "default"}
    text = json.dumps(document | {"metadata": metadata})
    return kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


@pytest.mark.parametrize("invalid", RUN_SCHEMA + STAGE_SCHEMA, ids=lambda invalid: invalid.id)
def test_server_rejects_same_fields_as_validate(invalid: InvalidSpec, kubectl: Kubectl, resource: None) -> None:
    answer = _try_create(kubectl, invalid.build())
    assert answer.returncode != 0, answer.stdout
    fields = set(FIELD.findall(answer.stderr) + UNKNOWN.findall(answer.stderr))
    assert fields == {error.field for error in validate(invalid.build())}, answer.stderr
    assert invalid.message.lower() in answer.stderr.lower()


@pytest.mark.parametrize("invalid", UNSUPPORTED, ids=lambda invalid: invalid.id)
def test_schema_accepts_unsupported_fields(invalid: InvalidSpec, kubectl: Kubectl, resource: None) -> None:
    answer = _try_create(kubectl, invalid.build())
    assert answer.returncode == 0, answer.stderr


def test_valid_spec_is_accepted(kubectl: Kubectl, resource: None) -> None:
    answer = _try_create(kubectl, build_document())
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_are_accepted(path: Path, kubectl: Kubectl, resource: None) -> None:
    answer = kubectl("create", "--dry-run=server", "--validate=strict", "-f", str(path))
    assert answer.returncode == 0, answer.stderr


def _change_model(spec: dict[str, Any]) -> None:
    spec["model"]["preset"] = "sail-vl-2b"


def _change_storage(spec: dict[str, Any]) -> None:
    spec["storage"]["volumeClaim"] = "other"


def _change_seed(spec: dict[str, Any]) -> None:
    spec["seed"] = 7


def _change_started(spec: dict[str, Any]) -> None:
    spec["stages"][0]["curate"]["minSide"] = 99


def _remove_started(spec: dict[str, Any]) -> None:
    del spec["stages"][0]
    spec["stages"][0]["pretrain"]["data"] = [{"path": "/data/x"}]


def _swap_waiting(spec: dict[str, Any]) -> None:
    spec["stages"][1], spec["stages"][2] = spec["stages"][2], spec["stages"][1]


def _remove_waiting(spec: dict[str, Any]) -> None:
    del spec["stages"][3]


REFUSED_CHANGES = [
    pytest.param(_change_model, "spec.model", "create a new run", id="model"),
    pytest.param(_change_storage, "spec.storage", "create a new run", id="storage"),
    pytest.param(_change_seed, "spec.seed", "create a new run", id="seed"),
    pytest.param(_change_started, "spec.stages", "stage curate: stages are immutable once started", id="started stage"),
    pytest.param(
        _remove_started, "spec.stages", "stage curate: stages are immutable once started", id="removed started stage"
    ),
    pytest.param(_swap_waiting, "spec.stages", "stages can't be removed, renamed or reordered", id="order of stages"),
    pytest.param(_remove_waiting, "spec.stages", "stages can't be removed, renamed or reordered", id="removed stage"),
]


def _change_workers(spec: dict[str, Any]) -> None:
    spec["workers"]["nodes"] = 3
    spec["stages"][0]["workers"] = {"nodes": 4}


def _change_waiting(spec: dict[str, Any]) -> None:
    spec["stages"][2]["sft"]["epochs"] = "2"


def _append(spec: dict[str, Any]) -> None:
    spec["stages"].append({"name": "more", "sft": {"data": [{"path": "/data/more"}], "epochs": "1"}})


def _suspend(spec: dict[str, Any]) -> None:
    spec["suspend"] = True


@pytest.fixture
def started(kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    """Create a run whose first stage is running."""
    document = build_document()
    document["metadata"] = {"name": "edited", "namespace": namespace}
    created = kubectl("create", "-f", "-", stdin=json.dumps(document))
    assert created.returncode == 0, created.stderr
    status = {"status": {"stages": [{"name": "curate", "state": "Running", "attempt": 1}]}}
    flags = ("--subresource=status", "--type=merge", "-p", json.dumps(status))
    patched = kubectl("-n", namespace, "patch", "svr", "edited", *flags)
    assert patched.returncode == 0, patched.stderr
    return document


def _replace(kubectl: Kubectl, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return kubectl("replace", "--dry-run=server", "-f", "-", stdin=json.dumps(document))


@pytest.mark.parametrize(("change", "field", "message"), REFUSED_CHANGES)
def test_server_rejects_edit_of_immutable_field(
    change: Callable[[dict[str, Any]], None], field: str, message: str, kubectl: Kubectl, started: dict[str, Any]
) -> None:
    change(started["spec"])
    answer = _replace(kubectl, started)
    assert answer.returncode != 0
    assert field in FIELD.findall(answer.stderr), answer.stderr
    assert message in answer.stderr


@pytest.mark.parametrize("change", [_change_workers, _change_waiting, _append, _suspend])
def test_server_accepts_edit_of_mutable_field(
    change: Callable[[dict[str, Any]], None], kubectl: Kubectl, started: dict[str, Any]
) -> None:
    change(started["spec"])
    answer = _replace(kubectl, started)
    assert answer.returncode == 0, answer.stderr


def test_kubectl_get_prints_summary_columns(kubectl: Kubectl, started: dict[str, Any]) -> None:
    shown = kubectl("-n", started["metadata"]["namespace"], "get", "svr")
    heads = " ".join(shown.stdout.split("\n")[0].split())
    assert heads == "NAME STAGE PROGRESS READY RESTARTS GOODPUT ETA REASON AGE"
