"""A spec that asks for as much as the schema takes: allow-lists name each field, and its pods get no more than that."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.status import Goodput, encode_status
from sailvl_operator.api.types import Defaults
from sailvl_operator.api.validation import validate
from sailvl_operator.core.decision import AttemptSpec
from sailvl_operator.core.desired.manifests import build_job
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.observe import observe
from sailvl_operator.core.reconcile import reconcile
from tests.support.builders.operator import build_document, build_run
from tests.support.core_world import CoreWorld, run_to_active_stage

HOSTILE: dict[str, Any] = {
    "image": "evil.example/x",
    "workers": {
        "nodes": 2,
        "gpusPerNode": 0,
        "priorityClassName": "system-node-critical",
        "schedulerName": "mine",
        "serviceAccountName": "cluster-admin",
        "nodeSelector": {"node-role.kubernetes.io/control-plane": ""},
        "tolerations": [{"operator": "Exists"}],
        "envFrom": [{"secretRef": {"name": "any-secret-of-the-namespace"}}],
        "env": [{"name": "LD_PRELOAD", "value": "/data/x.so"}],
        "labels": {"app": "payments", "sidecar.istio.io/inject": "false"},
    },
    "stages": [
        {
            "name": "curate",
            "curate": {
                "sources": [{"format": "imagefolder", "path": "/data/../etc"}],
                "caption": {"server": "http://169.254.169.254/latest"},
            },
        }
    ],
}
ALLOWED = AllowLists(
    images=("registry.example.com",),
    priority_classes=("batch",),
    toleration_keys=("nvidia.com/gpu",),
    service_accounts=("trainer",),
    server_hosts=("captions.team.svc",),
)


def start_first_attempt(**spec: Any) -> AttemptSpec:
    decision = reconcile(build_run(**spec), observe([], []), now=1e9, defaults=Defaults())
    [attempt] = decision.start
    return attempt


def build_pod(attempt: AttemptSpec) -> dict[str, Any]:
    """Return the pod template of an attempt's Job, as the API server gets it."""
    job = json.loads(msgspec.json.encode(build_job(attempt, build_appdef(attempt, rendezvous_secret="1a2b"))))
    template: dict[str, Any] = job["spec"]["template"]
    return template


def test_allow_lists_name_every_field_of_a_hostile_spec() -> None:
    errors = validate(build_document(**HOSTILE), ALLOWED)
    assert [error.field for error in errors] == [
        "spec.image",
        "spec.workers.priorityClassName",
        "spec.workers.serviceAccountName",
        "spec.workers.tolerations[0].key",
        "spec.stages[0].curate.caption.server",
    ]
    assert validate(build_document(**HOSTILE)) == []


def test_pod_of_a_hostile_spec_has_no_token_and_no_privileges() -> None:
    spec = build_pod(start_first_attempt(**HOSTILE))["spec"]
    [container] = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "hostAliases"} & set(spec)
    assert {name for volume in spec["volumes"] for name in volume} <= {
        *("name", "persistentVolumeClaim", "downwardAPI", "emptyDir"),
    }
    assert [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v] == [
        {"claimName": "sail-data"}
    ]


@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "sailvl.dev/run", "sailvl.dev/run-uid"])
def test_labels_of_a_hostile_spec_do_not_replace_those_of_the_operator(label: str) -> None:
    workers = HOSTILE["workers"] | {"labels": {label: "forged", "app": "payments"}}
    labels = build_pod(start_first_attempt(**HOSTILE | {"workers": workers}))["metadata"]["labels"]
    assert labels[label] != "forged"
    assert labels["app"] == "payments"


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", "999999T"), ("tokens", "999999.9999999T"), ("epochs", "1e99"), ("batchTokens", "0.001K")],
)
def test_extreme_count_reaches_the_workers_as_a_number_that_they_can_read(field: str, value: str) -> None:
    training = {"data": [{"path": "/data/x"}]} | ({} if field in ("tokens", "epochs") else {"epochs": "1"})
    stage = {"name": "train", "sft": training | {field: value}}
    assert validate(build_document(stages=[stage])) == []
    document = start_first_attempt(stages=[stage]).document
    assert msgspec.json.decode(msgspec.json.encode(document), type=type(document)) == document
    train = document.train
    assert train is not None
    assert train.batch_tokens >= 1
    assert train.tokens is None or train.tokens < 2**63


@pytest.mark.parametrize("price", ["9" * 16, "1e99", "0.1"])
def test_cost_at_an_extreme_price_fits_the_schema_of_the_status(price: str) -> None:
    world = CoreWorld(spec={"pricePerGpuHour": price, "workers": {"nodes": 2, "gpusPerNode": 8}})
    run_to_active_stage(world)
    world.status = msgspec.structs.replace(world.status, goodput=replace_seconds(world.status.goodput, seconds=10**9))
    world.now += 60
    world.reconcile_once()
    schema = build_schema()["properties"]["status"]
    jsonschema.validate(json.loads(json.dumps(encode_status(world.status))), schema)


def replace_seconds(goodput: Goodput, *, seconds: int) -> Goodput:
    return msgspec.structs.replace(goodput, seconds={"training": seconds}, gpu_seconds={"training": seconds * 64})


@pytest.mark.parametrize("quantity", ["1e999999999", "9" * 32])
def test_extreme_quantity_is_left_to_the_api_server(quantity: str) -> None:
    workers = HOSTILE["workers"] | {"resources": {"requests": {"cpu": quantity}}}
    [container] = build_pod(start_first_attempt(**HOSTILE | {"workers": workers}))["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": quantity}
