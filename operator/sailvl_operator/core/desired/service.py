"""Build the headless Service of a run, which gives its workers DNS names.

The names exist before the workers are ready, because workers become ready only after their rendezvous.
"""

from __future__ import annotations

from typing import Any

from sailvl_operator.api import names
from sailvl_operator.core.desired.metadata import build_labels, build_owner
from sailvl_trainer.contract import METRICS_PORT, RENDEZVOUS_PORT


def build_service(*, namespace: str, run: str, owner_uid: str) -> dict[str, Any]:
    """Build the one Service for all stages and attempts; pods join it by their subdomain."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(run),
            "namespace": namespace,
            "labels": build_labels(run),
            "ownerReferences": build_owner(run, owner_uid),
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": build_labels(run),
            "ports": [
                {"name": names.METRICS_PORT_NAME, "port": METRICS_PORT, "protocol": "TCP"},
                {"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"},
            ],
        },
    }
