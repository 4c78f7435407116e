"""Build the NetworkPolicy of a run: who may connect to its workers.

Workers accept any connection on the rendezvous port and on the ports of the process group, which have no
authentication. Connections that workers open themselves are not restricted: to storage, to the Hub, to servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.core.desired.manifests import build_labels, build_owner
from sailvl_trainer.contract import METRICS_PORT


def build_network_policy(
    *, namespace: str, run: str, owner_uid: str, metrics_peers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Build the NetworkPolicy of a run; `metrics_peers` may connect to the metrics port of its workers."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": names.network_policy_name(run),
            "namespace": namespace,
            "labels": build_labels(run),
            "ownerReferences": build_owner(run, owner_uid),
        },
        "spec": build_policy_spec(run=run, owner_uid=owner_uid, metrics_peers=metrics_peers),
    }


def build_policy_spec(*, run: str, owner_uid: str, metrics_peers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the spec of the NetworkPolicy, in the form in which the API server returns it.

    Pods are selected by the run's UID as well, because a later run may reuse the name. Without metrics peers there is
    no rule for them: one with an empty list would admit everyone.
    """
    workers = {"matchLabels": {names.LABEL_RUN: run, names.LABEL_RUN_UID: owner_uid}}
    ingress: list[dict[str, Any]] = [{"from": [{"podSelector": workers}]}]
    if metrics_peers:
        ingress.append({"from": list(metrics_peers), "ports": [{"port": METRICS_PORT, "protocol": "TCP"}]})
    return {"podSelector": workers, "policyTypes": ["Ingress"], "ingress": ingress}
