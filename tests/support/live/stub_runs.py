"""What tests of the operator on a real cluster share: stub workers, namespaces with a volume that the test can read,
the operator that serves them, and runs.
"""

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
from tests.support.live.api import CLAIMS, NAMESPACES, VOLUMES, Api, Object, build_object, until
from tests.support.live.replicas import Replica

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/cluster/stub_worker.sh"
RUN_LABEL = "sailvl.dev/run"

_BUILD = """
set -eu; export STORAGE_DRIVER=overlay
c=$(buildah from scratch)
buildah copy -q "$c" /bin/busybox /bin/busybox >/dev/null
buildah copy -q --chmod 755 "$c" "$1" /usr/local/bin/python >/dev/null
buildah config --env PATH=/usr/local/bin:/bin "$c"
buildah commit -q "$c" "$2" >/dev/null; buildah rm "$c" >/dev/null
buildah push -q --tls-verify=false "$2" "docker://$2"
"""


def build_image(registry: str) -> str:
    """The stub worker's image in the cluster's registry, named by its content: nodes keep what they have pulled."""
    if given := os.environ.get("SAILVL_STUB_IMAGE"):
        return given
    if not shutil.which("buildah"):
        pytest.skip("buildah builds the stub worker's image; or name one with SAILVL_STUB_IMAGE")
    tag = hashlib.sha256((_BUILD + SCRIPT.read_text()).encode()).hexdigest()[:12]
    image = f"{registry}/sailvl-stub-worker:{tag}"
    done = subprocess.run(
        ["bash", "-c", _BUILD, "bash", SCRIPT, image], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return image


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A namespace whose claim `data` is a folder of this machine."""

    api: Api
    namespace: str
    storage: Path
    image: str

    def add_volume(self, name: str, claim: str, **source: Any) -> None:
        """A PersistentVolume for a claim of this namespace; where it is not said, in a folder of the storage."""
        folder = self.storage / claim
        if not source:
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        body = build_object("PersistentVolume", name, labels={"test": self.namespace})
        spec = {"claimRef": {"name": claim, "namespace": self.namespace}, "capacity": {"storage": "1Gi"}} | _COMMON
        spec["hostPath"] = {"path": str(folder)} | source
        self.api.create(VOLUMES, body | {"spec": spec})

    def add_claim(self, name: str, volume: str = "") -> None:
        spec = {"resources": {"requests": {"storage": "1Gi"}}} | _COMMON | ({"volumeName": volume} if volume else {})
        body = build_object("PersistentVolumeClaim", name, namespace=self.namespace)
        self.api.create(CLAIMS, body | {"spec": spec})


_COMMON: Object = {"storageClassName": "static", "accessModes": ["ReadWriteMany"]}
"""A class without a provisioner: claims and volumes are bound to each other by name."""


@contextmanager
def open_place(api: Api, image: str, *, prefix: str = "stub") -> Iterator[Place]:
    """A namespace under the restricted Pod Security Standard, deleted afterwards with its volumes."""
    name = f"{prefix}-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create(NAMESPACES, build_object("Namespace", name, labels=labels))
    with tempfile.TemporaryDirectory(prefix="sailvl-", ignore_cleanup_errors=True) as folder:
        place = Place(api=api, namespace=name, storage=Path(folder), image=image)
        place.add_volume(name, "data")
        place.add_claim("data", name)
        try:
            until(lambda: (api.get(CLAIMS, "data", name) or {})["status"].get("phase") == "Bound")
            yield place
        finally:
            api.delete(NAMESPACES, name)
            for volume in api.list(VOLUMES, selector=f"test={name}"):
                api.delete(VOLUMES, volume["metadata"]["name"])


@contextmanager
def open_operator(kubeconfig: str, places: Sequence[Place], folder: Path) -> Iterator[Replica]:
    """The operator of these namespaces, soon to ask why runs don't start."""
    namespaces = [place.namespace for place in places]
    with Replica(kubeconfig, namespaces, folder, diagnostics_interval=1, grace_seconds=30) as operator:
        operator.until_ready()
        yield operator


class Run:
    """One SailVLRun of stub workers; if only their number is given, they are named draw-a, draw-b and so on."""

    def __init__(
        self,
        place: Place,
        name: str,
        stub: str = "hold",
        *,
        nodes: int = 1,
        stages: int | list[Object] = 1,
        workers: Object | None = None,
        **spec: Any,
    ) -> None:
        self.place, self.api, self.name = place, place.api, name
        if isinstance(stages, int):
            stages = [build_stage(f"draw-{letter}") for letter in "abcd"[:stages]]
        usual = {"image": place.image, "storage": {"volumeClaim": "data"}, "model": {"preset": "tiny"}}
        spec = usual | {"stages": stages} | spec
        spec["workers"] = {"nodes": nodes, "gpusPerNode": 0} | (workers or {}) | self.env(stub)
        body = build_object("SailVLRun", name, RUNS.api_version, namespace=place.namespace, spec=spec)
        self.uid = self.api.create(RUNS, body)["metadata"]["uid"]

    @staticmethod
    def env(stub: str) -> Object:
        return {"env": [{"name": "STUB", "value": stub}]}

    @property
    def raw(self) -> Object:
        return self.api.get(RUNS, self.name, self.place.namespace) or {}

    @property
    def status(self) -> Object:
        return self.raw.get("status", {})

    def edit(self, **spec: Any) -> None:
        self.api.patch(RUNS, self.name, {"spec": spec}, self.place.namespace)

    def annotate(self, **annotations: str | None) -> None:
        self.api.patch(RUNS, self.name, {"metadata": {"annotations": annotations}}, self.place.namespace)

    def ask(self, stage: str) -> None:
        """As `kubectl annotate svr NAME sailvl.dev/restart-stage=STAGE` does; waits until it is taken off."""
        self.annotate(**{"sailvl.dev/restart-stage": stage})
        until(lambda: not self.raw["metadata"].get("annotations"))

    def delete(self) -> None:
        self.api.delete(RUNS, self.name, self.place.namespace)

    def release(self, stage: str = "draw-a") -> None:
        """Lets workers of the mode `until` end."""
        (self.place.storage / "data" / f"{self.name}.{stage}").touch()

    def stage(self, index: int = 0) -> Object:
        stages = self.status.get("stages", [])
        return stages[index] if stages else {"name": "", "state": "", "attempt": 0}

    def at(self, index: int = 0) -> tuple[str, int]:
        """State and attempt of a stage."""
        stage = self.stage(index)
        return stage["state"], stage.get("attempt", 0)

    def condition(self, type_: str) -> tuple[str, str, str]:
        """Status, reason and message."""
        found = next((c for c in self.status.get("conditions", []) if c["type"] == type_), None)
        return ("", "", "") if found is None else (found["status"], found["reason"], found["message"])

    def is_true(self, type_: str) -> bool:
        return self.condition(type_)[0] == "True"

    def children(self, resource: Any) -> list[Object]:
        return self.api.list(resource, self.place.namespace, f"{RUN_LABEL}={self.name}")

    def count_children(self) -> int:
        return sum(len(self.children(resource)) for resource in (JOBS, PODS, SERVICES))

    @property
    def jobs(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in self.children(JOBS))

    @property
    def journal(self) -> list[str]:
        """What its workers did: stage, attempt, index, word."""
        path = self.place.storage / "data" / f"{self.name}.journal"
        return path.read_text().splitlines() if path.exists() else []

    def until_at(self, state: str, attempt: int = 1, *, index: int = 0, seconds: float = 120.0) -> None:
        until(lambda: self.at(index) == (state, attempt), seconds, told=self.describe)

    def until_true(self, type_: str, seconds: float = 120.0) -> str:
        """The condition's reason, once it is True."""
        until(lambda: self.is_true(type_), seconds, told=self.describe)
        return self.condition(type_)[1]

    def describe(self) -> str:
        """For the message of a test that fails."""
        pods = [
            (pod["metadata"]["name"], pod["metadata"].get("deletionTimestamp"), pod["status"])
            for pod in self.children(PODS)
        ]
        return json.dumps({"status": self.status, "jobs": self.jobs, "pods": pods, "journal": self.journal}, indent=1)

    def events(self) -> list[str]:
        """Reasons of the events that tell of it."""
        fields = f"involvedObject.name={self.name},involvedObject.uid={self.uid}"
        return [event["reason"] for event in self.api.list(EVENTS, self.place.namespace, fields=fields)]


def build_stage(name: str, **fields: Any) -> Object:
    return {"name": name, "curate": {"sources": [{"format": "procedural", "samples": 8}]}} | fields
