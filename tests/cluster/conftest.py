"""The cluster of the tests: the one that KUBECONFIG names, else that of `make cluster`, brought up if it is not."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """Path of the credentials; the local cluster is brought up if it isn't."""
    if "KUBECONFIG" in os.environ:
        return os.environ["KUBECONFIG"]
    if os.geteuid() != 0:
        pytest.skip("no KUBECONFIG, and a local cluster needs root")
    log = ROOT / "build/cluster-up.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        # to a file: the cluster's processes outlive the script, and a pipe would wait for them
        code = subprocess.call([ROOT / "hack/cluster/cluster.sh", "up"], cwd=ROOT, stdout=out, stderr=out)
    assert code == 0, log.read_text()[-3000:]
    return str(ROOT / "build/cluster/pki/admin.conf")


@pytest.fixture(scope="session")
def kubectl(kubeconfig: str) -> Kubectl:
    """kubectl with the cluster's credentials; `stdin` is its input, and failures are the caller's."""

    def call(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", f"--kubeconfig={kubeconfig}", *args]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)

    return call


@pytest.fixture(scope="session")
def resource(kubectl: Kubectl) -> None:
    """The CustomResourceDefinition, established."""
    applied = kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/sailvlruns.yaml"))
    assert applied.returncode == 0, applied.stderr
    waited = kubectl("wait", "--for=condition=Established", "crd/sailvlruns.sailvl.dev", "--timeout=30s")
    assert waited.returncode == 0, waited.stderr


@pytest.fixture
def namespace(kubectl: Kubectl, resource: None) -> Iterator[str]:
    """A namespace of the test's own, deleted afterwards."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    assert kubectl("create", "namespace", name).returncode == 0
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
