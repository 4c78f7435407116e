"""One whole run on the cluster, with killed operators and a killed rank on its way; the tests look at what it left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusters import Cluster, Kubectl
from prometheus_server import Prometheus, render_monitors, start_prometheus

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/sailvl-operator"
NAMESPACE, SYSTEM, RELEASE = "sailvl-e2e", "sailvl-e2e-system", "sailvl-e2e"
WORKER_USER = 65532
LIMIT = 1500
"""Seconds that the run may take."""
KILL_RANK = (
    "import os, signal, pathlib\n"
    "ranks = [int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
    "         and b'sailvl_trainer.rank' in (p / 'cmdline').read_bytes()]\n"
    "os.kill(min(ranks), signal.SIGKILL)\n"
)


@dataclass
class Story:
    """What was seen of the run, and what it left."""

    storage: Path
    namespace: str
    status: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """`kubectl get svr`, a line whenever it changed."""
    events: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)
    """Every Job that was ever seen: name to uid."""
    doubled: list[str] = field(default_factory=list)
    nodes: dict[str, set[str]] = field(default_factory=dict)
    """Job to the nodes of its pods."""
    prometheus: Prometheus | None = None

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's status."""
        found: dict[str, Any] = next(s for s in self.status["stages"] if s["name"] == name)
        return found


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    names = ("SAILVL_OPERATOR_IMAGE", "SAILVL_TRAINER_IMAGE")
    missing = [name for name in names if name not in os.environ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not set: `make e2e` builds the images and sets them")
    return {name: os.environ[name] for name in names}


@pytest.fixture(scope="session")
def storage(cluster: Cluster) -> Path:
    """The volume's folder on the nodes' file system, with the demo's raw data."""
    if not cluster.is_ours:
        pytest.skip("the data is put on the nodes' own file system: needs the cluster of `make cluster`")
    data = ROOT / "build/e2e/data"
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
    """The chart, installed; the namespaces of operator and run enforce the restricted Pod Security Standard."""
    remove(kubectl, kubeconfig)
    for name in (SYSTEM, NAMESPACE):
        must(kubectl("create", "namespace", name))
        must(kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"))
    must(kubectl("apply", "-f", "-", stdin=json.dumps(build_volume(storage))))
    must(kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/sailvlruns.yaml")))
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
    """A real Prometheus that discovers what the chart's monitors say."""
    folder, monitors = ROOT / "build/e2e/prometheus", render_monitors(CHART, release, SYSTEM)
    with start_prometheus(folder, kubeconfig, monitors, [SYSTEM, NAMESPACE]) as server:
        yield server


@pytest.fixture(scope="session")
def story(kubectl: Kubectl, prometheus: Prometheus, storage: Path) -> Story:
    """The whole run, killed at on its way, to its end."""
    must(kubectl("-n", NAMESPACE, "apply", "-f", "-", stdin=json.dumps(build_demo())))
    story = Story(storage=storage, namespace=NAMESPACE, prometheus=prometheus)
    faults = iter(
        [
            (at_step("alignment", 30), lambda: kill_rank(kubectl, story, "alignment")),
            (at_step("knowledge", 20), lambda: kill_operators(kubectl)),
            (at_step("instruction", 20), lambda: kill_operators(kubectl)),
        ]
    )
    when, do = next(faults)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        look(kubectl, story)
        if when(story):
            do()
            when, do = next(faults, (lambda _: False, lambda: None))
        if any(c["status"] == "True" and c["type"] in ("Succeeded", "Failed") for c in conditions(story)):
            break
        time.sleep(1)
    write(story)
    return story


def build_demo() -> dict[str, Any]:
    """The sample as it is, but that a killed rank is the next attempt's business."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "crds/samples/demo.yaml").read_text())
    document["spec"]["restartPolicy"] = {"inPlaceRestarts": 0}
    return document


def build_volume(folder: Path) -> dict[str, Any]:
    """A volume on the file system that the nodes share, and the sample's claim on it."""
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


def at_step(stage: str, step: int) -> Callable[[Story], bool]:
    """Whether a stage runs and has come so far."""

    def is_there(story: Story) -> bool:
        found = [s for s in story.status.get("stages", []) if s["name"] == stage and s["state"] == "Running"]
        return bool(found) and (found[0].get("progress") or {}).get("step", 0) >= step

    return is_there


def kill_rank(kubectl: Kubectl, story: Story, stage: str) -> None:
    """kill -9 of the rank in the second worker."""
    selector = f"sailvl.dev/stage={stage},batch.kubernetes.io/job-completion-index=1"
    pod = must(kubectl("-n", story.namespace, "get", "pod", "-l", selector, "-o", "name")).strip()
    must(kubectl("-n", story.namespace, "exec", pod, "--", "python", "-c", KILL_RANK))


def kill_operators(kubectl: Kubectl) -> None:
    """kill -9 of every replica's process, from the nodes: inside its container PID 1 can't be killed."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command, group = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
        except OSError:
            continue
        if b"sailvl\0operator" in command and "kubepods" in group:
            os.kill(int(folder.name), 9)


def look(kubectl: Kubectl, story: Story) -> None:
    """Add what is new."""
    answer = kubectl("-n", story.namespace, "get", "svr", "demo", "-o", "json")
    story.status = json.loads(answer.stdout).get("status", {}) if answer.returncode == 0 else story.status
    for job in json.loads(must(kubectl("-n", story.namespace, "get", "jobs", "-o", "json")))["items"]:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        if story.jobs.setdefault(name, uid) != uid:
            story.doubled.append(name)
    for pod in json.loads(must(kubectl("-n", story.namespace, "get", "pods", "-o", "json")))["items"]:
        if pod["spec"].get("nodeName"):
            job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            story.nodes.setdefault(job, set()).add(pod["spec"]["nodeName"])
    lines = kubectl("-n", story.namespace, "get", "svr").stdout.splitlines()
    if len(lines) == 2 and [lines[1].split()[:-1]] != [line.split()[:-1] for line in story.columns[-1:]]:
        story.columns += lines if not story.columns else lines[1:]


def conditions(story: Story) -> list[dict[str, Any]]:
    """Of the newest status."""
    found: list[dict[str, Any]] = story.status.get("conditions", [])
    return found


def write(story: Story) -> None:
    """The story for people, in build/e2e."""
    folder = ROOT / "build/e2e"
    (folder / "get.txt").write_text("\n".join(story.columns) + "\n")
    (folder / "status.json").write_text(json.dumps(story.status, indent=2))


def remove(kubectl: Kubectl, kubeconfig: str) -> None:
    """Whatever an earlier test left."""
    subprocess.run(
        ["helm", f"--kubeconfig={kubeconfig}", "-n", SYSTEM, "uninstall", RELEASE, "--ignore-not-found"],
        capture_output=True,
        check=False,
    )
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--ignore-not-found", "--timeout=100s")
    kubectl("delete", "pv", RELEASE, "--ignore-not-found", "--timeout=30s")


def must(done: subprocess.CompletedProcess[str]) -> str:
    """Its output; what it said when it failed."""
    assert done.returncode == 0, done.stderr
    return done.stdout
