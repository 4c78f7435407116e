"""The operator's installation for the fault tests, once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.environment.api import ClusterReader
from tests.faults.environment.installation import NAMESPACE, Installation, install, remove
from tests.faults.environment.volumes import prepare_data
from tests.support.live.cluster import Cluster, Kubectl


@pytest.fixture(scope="session")
def installation(cluster: Cluster, kubectl: Kubectl, kubeconfig: str) -> Iterator[Installation]:
    """Install the chart on the cluster of `make cluster`."""
    if not cluster.is_ours:
        pytest.skip("faults are injected into nodes, disks and processes, which needs the cluster of `make cluster`")
    operator, trainer = (os.environ.get(f"SAILVL_{name}_IMAGE", "") for name in ("OPERATOR", "TRAINER"))
    if not operator or not trainer:
        pytest.skip("SAILVL_OPERATOR_IMAGE and SAILVL_TRAINER_IMAGE not set: `make faults` builds the images")
    prepare_data()
    remove(kubectl, kubeconfig)
    install(kubectl, kubeconfig, operator, trainer)
    yield Installation(kubectl=kubectl, api=ClusterReader(kubeconfig, NAMESPACE), trainer_image=trainer)
    if not os.environ.get("SAILVL_KEEP"):
        remove(kubectl, kubeconfig)
