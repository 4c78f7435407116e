"""Runs of stub workers on a real cluster, with namespaces whose volumes the test can read, and their operator."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.cluster.resources import EVENTS, JOBS, PODS, RUNS, SERVICES
from tests.support.live.api import CLAIMS, NAMESPACES, VOLUMES, ClusterApi, Object, build_object, wait_until
from tests.support.live.replicas import OperatorReplica

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/cluster/stub_worker.sh"
RUN_LABEL = "sailvl.dev/run"

_BUILD_SCRIPT = """
set -eu; export STORAGE_DRIVER=overlay
c=$(buildah from scratch)
buildah copy -q "$c" /bin/busybox /bin/busybox >/dev/null
buildah copy -q --chmod 755 "$c" "$1" /usr/local/bin/python >/dev/null
buildah config --env PATH=/usr/local/bin:/bin "$c"
buildah commit -q "$c" "$2" >/dev/null; buildah rm "$c" >/dev/null
buildah push -q --tls-verify=false "$2" "docker://$2"
"""


def build_stub_image(registry: str) -> str:
    """Push the stub worker's image to the registry; its tag is a hash of its content, so that nodes can cache it."""
    if given := os.environ.get("SAILVL_STUB_IMAGE"):
        return given
    if not shutil.which("buildah"):
        pytest.skip("buildah builds the stub worker's image; or name one with SAILVL_STUB_IMAGE")
    tag = hashlib.sha256((_BUILD_SCRIPT + SCRIPT.read_text()).encode()).hexdigest()[:12]
    image = f"{registry}/sailvl-stub-worker:{tag}"
    done = subprocess.run(
        ["bash", "-c", _BUILD_SCRIPT, "bash", SCRIPT, image], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return image


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """A namespace whose claim `data` is a folder on the host."""

    api: ClusterApi
    namespace: str
    storage: Path
    image: str

    def add_volume(self, name: str, claim: str, **source: Any) -> None:
        """Add a PersistentVolume for a claim of this namespace; by default it is a folder of the storage."""
        folder = self.storage / claim
        if not source:
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        body = build_object("PersistentVolume", name, labels={"test": self.namespace})
        spec = {
            "claimRef": {"name": claim, "namespace": self.namespace},
            "capacity": {"storage": "1Gi"},
        } | _STATIC_STORAGE
        spec["hostPath"] = {"path": str(folder)} | source
        self.api.create(VOLUMES, body | {"spec": spec})

    def add_claim(self, name: str, volume: str = "") -> None:
        """Add a claim, bound to a volume if one is named."""
        spec = (
            {"resources": {"requests": {"storage": "1Gi"}}}
            | _STATIC_STORAGE
            | ({"volumeName": volume} if volume else {})
        )
        body = build_object("PersistentVolumeClaim", name, namespace=self.namespace)
        self.api.create(CLAIMS, body | {"spec": spec})


_STATIC_STORAGE: Object = {"storageClassName": "static", "accessModes": ["ReadWriteMany"]}
"""The storage class has no provisioner: claims and volumes are bound by name."""


@contextmanager
def open_workspace(api: ClusterApi, image: str, *, prefix: str = "stub") -> Iterator[Workspace]:
    """Create a namespace under the restricted Pod Security Standard; delete it with its volumes afterwards."""
    name = f"{prefix}-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create(NAMESPACES, build_object("Namespace", name, labels=labels))
    with tempfile.TemporaryDirectory(prefix="sailvl-", ignore_cleanup_errors=True) as folder:
        workspace = Workspace(api=api, namespace=name, storage=Path(folder), image=image)
        workspace.add_volume(name, "data")
        workspace.add_claim("data", name)
        try:
            wait_until(lambda: (api.get(CLAIMS, "data", name) or {})["status"].get("phase") == "Bound")
            yield workspace
        finally:
            api.delete(NAMESPACES, name)
            for volume in api.list(VOLUMES, selector=f"test={name}"):
                api.delete(VOLUMES, volume["metadata"]["name"])


@contextmanager
def open_operator(kubeconfig: str, workspaces: Sequence[Workspace], folder: Path) -> Iterator[OperatorReplica]:
    """Run an operator for some namespaces, with fast start diagnostics."""
    namespaces = [workspace.namespace for workspace in workspaces]
    with OperatorReplica(kubeconfig, namespaces, folder, diagnostics_interval_seconds=1, grace_seconds=30) as operator:
        operator.wait_until_ready()
        yield operator


class StubRun:
    """One SailVLRun of stub workers. If `stages` is a number, the stages are named draw-a, draw-b and so on."""

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        stub: str = "hold",
        *,
        nodes: int = 1,
        stages: int | list[Object] = 1,
        workers: Object | None = None,
        **spec: Any,
    ) -> None:
        self.workspace, self.api, self.name = workspace, workspace.api, name
        if isinstance(stages, int):
            stages = [build_stage(f"draw-{letter}") for letter in "abcd"[:stages]]
        usual = {"image": workspace.image, "storage": {"volumeClaim": "data"}, "model": {"preset": "tiny"}}
        spec = usual | {"stages": stages} | spec
        spec["workers"] = {"nodes": nodes, "gpusPerNode": 0} | (workers or {}) | self.build_env(stub)
        body = build_object("SailVLRun", name, RUNS.api_version, namespace=workspace.namespace, spec=spec)
        self.uid = self.api.create(RUNS, body)["metadata"]["uid"]

    @staticmethod
    def build_env(stub: str) -> Object:
        """Return the part of `workers` that selects the behaviour of the stub workers."""
        return {"env": [{"name": "STUB", "value": stub}]}

    @property
    def raw(self) -> Object:
        """The stored run; empty if it does not exist."""
        return self.api.get(RUNS, self.name, self.workspace.namespace) or {}

    @property
    def status(self) -> Object:
        """The run's status; empty before the first."""
        return self.raw.get("status", {})

    def edit(self, **spec: Any) -> None:
        """Change fields of the spec."""
        self.api.patch(RUNS, self.name, {"spec": spec}, self.workspace.namespace)

    def annotate(self, **annotations: str | None) -> None:
        """Set annotations; None removes one."""
        self.api.patch(RUNS, self.name, {"metadata": {"annotations": annotations}}, self.workspace.namespace)

    def request_restart(self, stage: str) -> None:
        """Annotate the run with sailvl.dev/restart-stage and wait until the operator has removed the annotation."""
        self.annotate(**{"sailvl.dev/restart-stage": stage})
        wait_until(lambda: not self.raw["metadata"].get("annotations"))

    def delete(self) -> None:
        """Delete the run."""
        self.api.delete(RUNS, self.name, self.workspace.namespace)

    def release(self, stage: str = "draw-a") -> None:
        """Let the workers of the mode `until` succeed."""
        (self.workspace.storage / "data" / f"{self.name}.{stage}").touch()

    def stage(self, index: int = 0) -> Object:
        """Return the status of a stage."""
        stages = self.status.get("stages", [])
        return stages[index] if stages else {"name": "", "state": "", "attempt": 0}

    def stage_state(self, index: int = 0) -> tuple[str, int]:
        """Return state and attempt of a stage."""
        stage = self.stage(index)
        return stage["state"], stage.get("attempt", 0)

    def condition(self, type_: str) -> tuple[str, str, str]:
        """Return status, reason and message of a condition."""
        found = next((c for c in self.status.get("conditions", []) if c["type"] == type_), None)
        return ("", "", "") if found is None else (found["status"], found["reason"], found["message"])

    def is_true(self, type_: str) -> bool:
        """Return whether a condition is true."""
        return self.condition(type_)[0] == "True"

    def list_owned(self, resource: Any) -> list[Object]:
        """Return the run's objects of a kind."""
        return self.api.list(resource, self.workspace.namespace, f"{RUN_LABEL}={self.name}")

    def count_owned(self) -> int:
        """Return the number of the run's Jobs, pods and Services."""
        return sum(len(self.list_owned(resource)) for resource in (JOBS, PODS, SERVICES))

    @property
    def jobs(self) -> list[str]:
        """The names of the run's Jobs."""
        return sorted(job["metadata"]["name"] for job in self.list_owned(JOBS))

    @property
    def journal(self) -> list[str]:
        """The lines that the stub workers logged: stage, attempt, index and event."""
        path = self.workspace.storage / "data" / f"{self.name}.journal"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_stage(self, state: str, attempt: int = 1, *, index: int = 0, seconds: float = 120.0) -> None:
        """Wait until a stage has a state and an attempt."""
        wait_until(lambda: self.stage_state(index) == (state, attempt), seconds, describe=self.describe)

    def wait_for_condition(self, type_: str, seconds: float = 120.0) -> str:
        """Wait until a condition is true and return its reason."""
        wait_until(lambda: self.is_true(type_), seconds, describe=self.describe)
        return self.condition(type_)[1]

    def describe(self) -> str:
        """Return status, Jobs, pods and journal, for the message of a failing test."""
        pods = [
            (pod["metadata"]["name"], pod["metadata"].get("deletionTimestamp"), pod["status"])
            for pod in self.list_owned(PODS)
        ]
        return json.dumps({"status": self.status, "jobs": self.jobs, "pods": pods, "journal": self.journal}, indent=1)

    def list_event_reasons(self) -> list[str]:
        """Return the reasons of the run's Events."""
        fields = f"involvedObject.name={self.name},involvedObject.uid={self.uid}"
        return [event["reason"] for event in self.api.list(EVENTS, self.workspace.namespace, fields=fields)]


def build_stage(name: str, **fields: Any) -> Object:
    """Return the spec of a stage."""
    return {"name": name, "curate": {"sources": [{"format": "procedural", "samples": 8}]}} | fields
