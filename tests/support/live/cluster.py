"""Fixtures of the cluster: the one that KUBECONFIG names, else that of `make cluster`, brought up if it is not."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "hack/cluster/cluster.sh"
IMPOSSIBLE = 3
"""The script's exit code where the machine can't have a cluster."""
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    kubeconfig: str
    """Path of the credentials."""
    registry: str
    """Where its nodes find images, `busybox:1` among them."""
    is_ours: bool
    """Whether nodes may be added and killed: it is the one of `make cluster`."""


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    if given := os.environ.get("KUBECONFIG"):
        registry = os.environ.get("REGISTRY", "docker.io/library")
        return Cluster(kubeconfig=given, registry=registry, is_ours=Path(given).is_relative_to(ROOT / "build/cluster"))
    done = subprocess.run([SCRIPT, "up"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == IMPOSSIBLE:
        pytest.skip(f"no KUBECONFIG, and {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return Cluster(kubeconfig=str(ROOT / "build/cluster/pki/admin.conf"), registry="localhost:5000", is_ours=True)


@pytest.fixture(scope="session")
def kubeconfig(cluster: Cluster) -> str:
    """Path of the credentials."""
    return cluster.kubeconfig


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """kubectl with the cluster's credentials; `stdin` is its input, and failures are the caller's."""

    def call(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", f"--kubeconfig={cluster.kubeconfig}", *args]
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
    """A namespace of the test's own under the restricted Pod Security Standard, deleted afterwards."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    assert kubectl("create", "namespace", name).returncode == 0
    assert kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted").returncode == 0
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
