"""Fixtures of the cluster: the one in KUBECONFIG, else that of `make cluster`, which is started if necessary."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.live.api import wait_until

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "hack/cluster/cluster.sh"
UNSUPPORTED_EXIT_CODE = 3
"""Exit code of the script on a machine that can't run a cluster."""
KUBECTL_SECONDS = 120
"""Longest time for a command of kubectl that doesn't wait for anything itself."""
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A real cluster."""

    kubeconfig: str
    """Path of the kubeconfig file."""
    registry: str
    """Registry from which its nodes pull images, `busybox:1` among them."""
    is_ours: bool
    """Whether it is the cluster of `make cluster`, whose nodes are processes of this machine and may be killed."""


def install_crd(kubectl: Sequence[str | Path]) -> None:
    """Install the CustomResourceDefinition with a kubectl command, and wait until it is established."""
    apply = [*kubectl, "apply", "--server-side", "--force-conflicts", "-f", ROOT / "crds/sailvlruns.yaml"]
    subprocess.run(apply, check=True, stdout=subprocess.DEVNULL)
    wait = [*kubectl, "wait", "--for=condition=Established", "crd/sailvlruns.sailvl.dev", "--timeout=30s"]
    # `kubectl wait` fails as long as there is no condition.
    wait_until(lambda: subprocess.run(wait, check=False, capture_output=True).returncode == 0, seconds=60)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    if given := os.environ.get("KUBECONFIG"):
        registry = os.environ.get("REGISTRY", "docker.io/library")
        return Cluster(kubeconfig=given, registry=registry, is_ours=Path(given).is_relative_to(ROOT / "build/cluster"))
    done = subprocess.run([SCRIPT, "up"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == UNSUPPORTED_EXIT_CODE:
        pytest.skip(f"no KUBECONFIG, and {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return Cluster(kubeconfig=str(ROOT / "build/cluster/pki/admin.conf"), registry="localhost:5000", is_ours=True)


@pytest.fixture(scope="session")
def kubeconfig(cluster: Cluster) -> str:
    """Return the path of the kubeconfig file."""
    return cluster.kubeconfig


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """Return kubectl with the cluster's kubeconfig as a function; it does not raise on failures.

    A command that waits by itself needs `limit_seconds` above its own `--timeout`, so that kubectl reports the timeout.
    """

    def call(
        *args: str, stdin: str | None = None, limit_seconds: float = KUBECTL_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", f"--kubeconfig={cluster.kubeconfig}", *args]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=limit_seconds)

    return call


@pytest.fixture(scope="session")
def resource(cluster: Cluster) -> None:
    """Install the CustomResourceDefinition and wait until it is established."""
    install_crd(["kubectl", f"--kubeconfig={cluster.kubeconfig}"])


@pytest.fixture
def namespace(kubectl: Kubectl, resource: None) -> Iterator[str]:
    """Create a namespace under the restricted Pod Security Standard, and delete it afterwards."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    assert kubectl("create", "namespace", name).returncode == 0
    assert kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted").returncode == 0
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
