"""The NetworkPolicy of a run: its manifest, and when it is created, updated and deleted."""

from __future__ import annotations

from typing import Any

import pytest

from sailvl_operator.api.status import StageStatus, Status, encode_status
from sailvl_operator.api.types import Defaults
from sailvl_operator.core.decision import NetworkPolicyAction
from sailvl_operator.core.desired.network_policy import build_network_policy
from sailvl_operator.core.observe import NetworkPolicyState, observe
from sailvl_operator.core.reconcile import reconcile
from tests.support.builders.operator import build_job, build_run

WORKERS = {"matchLabels": {"sailvl.dev/run": "demo", "sailvl.dev/run-uid": "run-uid"}}
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}, "podSelector": {}}
CREATE, UPDATE, DELETE = NetworkPolicyAction


def build_policy(*metrics_peers: dict[str, Any]) -> dict[str, Any]:
    return build_network_policy(namespace="team", run="demo", owner_uid="run-uid", metrics_peers=metrics_peers)


def test_policy_admits_workers_of_the_run_everywhere_and_metrics_peers_on_the_metrics_port() -> None:
    assert build_policy(PROMETHEUS) == {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": "demo",
            "namespace": "team",
            "labels": {"app.kubernetes.io/managed-by": "sailvl-operator", "sailvl.dev/run": "demo"},
            "ownerReferences": [
                {
                    "apiVersion": "sailvl.dev/v1alpha1",
                    "kind": "SailVLRun",
                    "name": "demo",
                    "uid": "run-uid",
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "podSelector": WORKERS,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": WORKERS}]},
                {"from": [PROMETHEUS], "ports": [{"port": 9400, "protocol": "TCP"}]},
            ],
        },
    }


def test_policy_without_metrics_peers_has_no_rule_with_an_empty_list_of_peers() -> None:
    assert build_policy()["spec"]["ingress"] == [{"from": [{"podSelector": WORKERS}]}]


REFUSED = {"engine": {"name": "fsdp2"}}
STARTING = Status(stages=(StageStatus(name="curate", state="Starting", attempt=1),))


@pytest.mark.parametrize(
    ("status", "state", "spec", "expected"),
    [
        pytest.param(Status(), "Missing", {}, CREATE, id="new run"),
        pytest.param(Status(), "Missing", {"suspend": True}, None, id="new run that is suspended has no workers"),
        pytest.param(STARTING, "Missing", {}, CREATE, id="active run whose policy was deleted"),
        pytest.param(STARTING, "Current", {}, None, id="active run"),
        pytest.param(STARTING, "Outdated", {}, UPDATE, id="changed peers"),
        pytest.param(STARTING, "Current", {"network": {"policy": "Disabled"}}, DELETE, id="disabled later"),
        pytest.param(STARTING, "Outdated", {"network": {"policy": "Disabled"}}, DELETE, id="disabled and outdated"),
        pytest.param(Status(), "Missing", {"network": {"policy": "Disabled"}}, None, id="disabled from the start"),
        pytest.param(STARTING, "Missing", REFUSED, CREATE, id="workers of a run whose spec is refused"),
        pytest.param(STARTING, "Outdated", REFUSED, UPDATE, id="changed peers of a run whose spec is refused"),
        pytest.param(Status(), "Missing", REFUSED, None, id="new run whose spec is refused"),
    ],
)
def test_policy_follows_the_spec(
    status: Status, state: NetworkPolicyState, spec: dict[str, Any], expected: NetworkPolicyAction | None
) -> None:
    run = build_run(status=encode_status(status), **spec)
    jobs = [build_job("curate")] if status.stages else []
    seen = observe(jobs, network_policy=state)
    assert reconcile(run, seen, now=10.0, defaults=Defaults()).network_policy is expected


@pytest.mark.parametrize(("state", "expected"), [("Missing", None), ("Current", DELETE), ("Outdated", DELETE)])
def test_operator_without_network_policies_deletes_those_of_before(
    state: NetworkPolicyState, expected: NetworkPolicyAction | None
) -> None:
    seen = observe(network_policy=state)
    decision = reconcile(build_run(), seen, now=10.0, defaults=Defaults(network_policies=False))
    assert decision.network_policy is expected


def test_local_mode_needs_no_policy() -> None:
    assert reconcile(build_run(), observe(), now=10.0, defaults=Defaults()).network_policy is None
