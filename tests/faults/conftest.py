"""The site of the fault tests, once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.api import Api
from tests.faults.release import NAMESPACE, Site, install, remove
from tests.faults.volumes import prepare_data
from tests.support.live.cluster import Cluster, Kubectl


@pytest.fixture(scope="session")
def site(cluster: Cluster, kubectl: Kubectl, kubeconfig: str) -> Iterator[Site]:
    """The chart, installed on the cluster of `make cluster`."""
    if not cluster.is_ours:
        pytest.skip("faults are done to nodes, disks and processes: needs the cluster of `make cluster`")
    operator, trainer = (os.environ.get(f"SAILVL_{name}_IMAGE", "") for name in ("OPERATOR", "TRAINER"))
    if not operator or not trainer:
        pytest.skip("SAILVL_OPERATOR_IMAGE and SAILVL_TRAINER_IMAGE not set: `make faults` builds the images")
    prepare_data()
    remove(kubectl, kubeconfig)
    install(kubectl, kubeconfig, operator, trainer)
    yield Site(kubectl=kubectl, api=Api(kubeconfig, NAMESPACE), trainer_image=trainer)
    if not os.environ.get("SAILVL_KEEP"):
        remove(kubectl, kubeconfig)
