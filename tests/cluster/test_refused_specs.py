"""The real API server refuses the same specs as `sailvl validate`, in words that help."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from bad_specs import BAD_SPECS, BadSpec
from builders import build_document

pytestmark = pytest.mark.cluster

REFUSED = [bad for bad in BAD_SPECS if bad.where == "schema"]
TAKEN = [bad for bad in BAD_SPECS if bad.where == "operator"]
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


def _apply(kubectl: Kubectl, document: dict[str, object]) -> subprocess.CompletedProcess[str]:
    metadata = {"name": document["metadata"]["name"], "namespace": "default"}  # type: ignore[index]
    text = json.dumps(document | {"metadata": metadata})
    return kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad.id)
def test_the_server_refuses(bad: BadSpec, kubectl: Kubectl, resource: None) -> None:
    answer = _apply(kubectl, bad.build())
    assert answer.returncode != 0, answer.stdout
    said = answer.stderr.lower()
    assert bad.words.lower() in said or bad.field.split("[")[0].split(".")[-1].lower() in said, answer.stderr


@pytest.mark.parametrize("bad", TAKEN, ids=lambda bad: bad.id)
def test_what_is_left_to_the_operator_is_in_the_schema(bad: BadSpec, kubectl: Kubectl, resource: None) -> None:
    answer = _apply(kubectl, bad.build())
    assert answer.returncode == 0, answer.stderr


def test_the_good_one_is_taken(kubectl: Kubectl, resource: None) -> None:
    answer = _apply(kubectl, build_document())
    assert answer.returncode == 0, answer.stderr


def test_a_started_stage_stays_as_it_is(kubectl: Kubectl, namespace: str) -> None:
    document = build_document()
    document["metadata"] = {"name": "edited", "namespace": namespace}
    assert kubectl("create", "-f", "-", stdin=json.dumps(document)).returncode == 0
    status = {"status": {"stages": [{"name": "curate", "state": "Running", "attempt": 1}]}}
    patched = kubectl(
        "-n", namespace, "patch", "svr", "edited", "--subresource=status", "--type=merge", "-p", json.dumps(status)
    )
    assert patched.returncode == 0, patched.stderr
    document["spec"]["stages"][0]["curate"]["minSide"] = 99
    refused = kubectl("apply", "-f", "-", stdin=json.dumps(document))
    assert refused.returncode != 0
    assert "a stage that has started can't be changed" in refused.stderr
    document["spec"]["stages"][0]["curate"].pop("minSide")
    document["spec"]["stages"][2]["sft"]["epochs"] = "2"
    allowed = kubectl("apply", "-f", "-", stdin=json.dumps(document))
    assert allowed.returncode == 0, allowed.stderr
