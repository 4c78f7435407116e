"""One whole run on a real cluster, during which a rank and all operators are killed; the tests check its results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.live.cluster import Cluster, Kubectl
from tests.support.live.prometheus import Prometheus, render_monitors, start_prometheus
from tests.support.live.run_plot import draw_run
from tests.support.live.whole_run import (
    RUN,
    ScheduledFault,
    WholeRun,
    follow,
    format_table,
    kill_operators,
    kill_second_rank,
    require_success,
)

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/sailvl-operator"
FOLDER = ROOT / "build/e2e"
NAMESPACE, SYSTEM, RELEASE = "sailvl-e2e", "sailvl-e2e-system", "sailvl-e2e"
WORKER_USER = 65532
RUN_TIMEOUT_SECONDS = 1500
FAULTS = [
    ScheduledFault(stage="alignment", step=30, title="kill -9 of a rank", inject=kill_second_rank),
    ScheduledFault(stage="knowledge", step=20, title="kill -9 of the operators", inject=kill_operators),
    ScheduledFault(stage="instruction", step=20, title="kill -9 of the operators", inject=kill_operators),
]


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    names = ("SAILVL_OPERATOR_IMAGE", "SAILVL_TRAINER_IMAGE")
    missing = [name for name in names if name not in os.environ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not set: `make e2e` builds the images and sets them")
    return {name: os.environ[name] for name in names}


@pytest.fixture(scope="session")
def storage(cluster: Cluster) -> Path:
    """Return the volume's folder on the nodes' file system, with the demo's data."""
    if not cluster.is_ours:
        pytest.skip("the data is written to the nodes' file system: needs the cluster of `make cluster`")
    data = FOLDER / "data"
    subprocess.run([ROOT / "hack/demo_data.sh", ROOT / ".venv/bin/python", ROOT / "build/demo"], cwd=ROOT, check=True)
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    for name in ("raw", "sft", "benchmarks", "models"):
        shutil.copytree(ROOT / "build/demo" / name, data / name)
    for path in (data, *data.rglob("*")):
        os.chown(path, WORKER_USER, WORKER_USER)
    return data


@pytest.fixture(scope="session")
def release(kubectl: Kubectl, kubeconfig: str, images: dict[str, str], storage: Path) -> Iterator[str]:
    """Install the chart; the namespaces of operator and run enforce the restricted Pod Security Standard."""
    remove(kubectl, kubeconfig)
    for name in (SYSTEM, NAMESPACE):
        require_success(kubectl("create", "namespace", name))
        require_success(kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"))
    require_success(kubectl("apply", "-f", "-", stdin=json.dumps(build_volume(storage))))
    require_success(kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/sailvlruns.yaml")))
    repository, _, tag = images["SAILVL_OPERATOR_IMAGE"].rpartition(":")
    values = {
        "image": {"repository": repository, "tag": tag},
        "runs": {"trainerImage": images["SAILVL_TRAINER_IMAGE"]},
        "watchNamespaces": [NAMESPACE],
    }
    command = ["helm", f"--kubeconfig={kubeconfig}", "-n", SYSTEM, "install", RELEASE, str(CHART), "--skip-crds"]
    command += ["--wait", "--timeout=300s", "-f", "-"]
    installed = subprocess.run(command, input=json.dumps(values), text=True, capture_output=True, check=False)
    assert installed.returncode == 0, installed.stderr + kubectl("-n", SYSTEM, "describe", "pods").stdout[-3000:]
    yield RELEASE
    if not os.environ.get("SAILVL_KEEP"):
        remove(kubectl, kubeconfig)


@pytest.fixture(scope="session")
def prometheus(kubectl: Kubectl, kubeconfig: str, release: str) -> Iterator[Prometheus]:
    """Start a real Prometheus that scrapes what the chart's monitors select."""
    folder, monitors = FOLDER / "prometheus", render_monitors(CHART, release, SYSTEM)
    with start_prometheus(folder, kubeconfig, monitors, [SYSTEM, NAMESPACE]) as server:
        yield server


@pytest.fixture(scope="session")
def whole_run(kubectl: Kubectl, prometheus: Prometheus, storage: Path) -> WholeRun:
    """Follow the whole run to its end, inject the faults, and write its record to build/e2e."""
    require_success(kubectl("-n", NAMESPACE, "apply", "-f", "-", stdin=json.dumps(build_demo())))
    whole_run = WholeRun(storage=storage, namespace=NAMESPACE)
    try:
        follow(kubectl, whole_run, FAULTS, RUN_TIMEOUT_SECONDS)
    finally:
        (FOLDER / "get.txt").write_text(format_table(whole_run.columns))
        (FOLDER / "status.json").write_text(json.dumps(whole_run.status, indent=2))
        (FOLDER / "describe.txt").write_text(kubectl("-n", NAMESPACE, "describe", "svr", RUN).stdout)
    draw_run(FOLDER / "run.png", prometheus, whole_run.status, whole_run.faults)
    return whole_run


def build_demo() -> dict[str, Any]:
    """Return the demo without restarts in place, so that a killed rank causes a new attempt."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "examples/01-demo/run.yaml").read_text())
    document["spec"]["restartPolicy"] = {"inPlaceRestarts": 0}
    return document


def build_volume(folder: Path) -> dict[str, Any]:
    """Return a volume on the file system that the nodes share, and the demo's claim on it."""
    modes, size = ["ReadWriteMany"], {"storage": "10Gi"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": RELEASE},
        "spec": {"capacity": size, "accessModes": modes, "hostPath": {"path": str(folder)}, "storageClassName": ""},
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "sail-data", "namespace": NAMESPACE},
        "spec": {
            "accessModes": modes,
            "resources": {"requests": size},
            "storageClassName": "",
            "volumeName": RELEASE,
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [volume, claim]}


def remove(kubectl: Kubectl, kubeconfig: str) -> None:
    """Remove the release, its namespaces and its volume."""
    subprocess.run(
        ["helm", f"--kubeconfig={kubeconfig}", "-n", SYSTEM, "uninstall", RELEASE, "--ignore-not-found"],
        capture_output=True,
        check=False,
    )
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--ignore-not-found", "--timeout=100s")
    kubectl("delete", "pv", RELEASE, "--ignore-not-found", "--timeout=30s")
