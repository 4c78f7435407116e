"""The operator as a process against a real cluster, with stub workers instead of the trainer; read through kubectl."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.live.api import wait_until
from tests.support.live.cluster import Cluster, install_crd
from tests.support.live.stub_runs import build_stub_image

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
PORT = 18080
CALL = "import sys; from sailvl_operator.cli.main import main; sys.exit(main())"


def find_kubeconfig() -> str:
    """Return KUBECONFIG, or that of the cluster of `make cluster`; empty if there is neither."""
    local = ROOT / "build" / "cluster" / "pki" / "admin.conf"
    return os.environ.get("KUBECONFIG") or (str(local) if local.exists() else "")


def kubectl(*arguments: str, body: Any = None, check: bool = True) -> str:
    done = subprocess.run(
        ["kubectl", "--kubeconfig", find_kubeconfig(), *arguments],
        input=None if body is None else json.dumps(body),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    return build_stub_image(cluster.registry)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Create a namespace under the restricted Pod Security Standard, with a claim that the nodes can mount."""
    if not find_kubeconfig():
        pytest.skip("no cluster: set KUBECONFIG or run `make cluster`")
    install_crd(["kubectl", f"--kubeconfig={find_kubeconfig()}"])
    name = f"operator-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl(
        "apply", "-f", "-", body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    )
    common = {"storageClassName": "", "accessModes": ["ReadWriteMany"]}
    storage = tmp_path_factory.mktemp("storage")
    volume = {
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": str(storage)},
        "claimRef": {"name": "data", "namespace": name},
    }
    claim = {"resources": {"requests": {"storage": "1Gi"}}, "volumeName": name}
    kubectl(
        "apply",
        "-f",
        "-",
        body={"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": common | volume},
    )
    kubectl(
        "apply",
        "-f",
        "-",
        body={
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data", "namespace": name},
            "spec": common | claim,
        },
    )
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
    kubectl("delete", "pv", name, "--wait=false")


class OperatorOnFixedPort:
    """`sailvl operator` as a child process."""

    def __init__(self, namespace: str, log: Path) -> None:
        self.namespace, self.log = namespace, log
        self.start()

    def start(self) -> None:
        flags = ["--namespaces", self.namespace, "--lease-namespace", self.namespace, "--metrics-port", str(PORT)]
        fast = [
            "--failure-settle-seconds",
            "1",
            "--backoff-seconds",
            "1",
            "--lease-duration-seconds",
            "4",
            "--lease-renew-deadline-seconds",
            "3",
        ]
        command = [sys.executable, "-c", CALL, "operator", *flags, *fast, "--lease-renew-interval-seconds", "1"]
        paths = os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer"))
        environment = os.environ | {"KUBECONFIG": find_kubeconfig(), "PYTHONPATH": paths}
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*command, "--identity", "test"], env=environment, stdout=output, stderr=output
            )
        wait_until(lambda: self.get("/readyz") == "ok")

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=2) as answer:
                return answer.read().decode()
        except OSError:
            assert self.process.poll() is None, f"the operator ended:\n{self.log.read_text()[-3000:]}"
            return ""

    def read_metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self, signal_: signal.Signals) -> int:
        self.process.send_signal(signal_)
        return self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def operator(namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorOnFixedPort]:
    running = OperatorOnFixedPort(namespace, tmp_path_factory.mktemp("operator") / "log")
    yield running
    assert running.stop(signal.SIGTERM) == 0, running.log.read_text()[-3000:]


class KubectlRun:
    """One SailVLRun, read with kubectl."""

    def __init__(self, namespace: str, name: str, image: str, stub: str, *, nodes: int = 1, stages: int = 1) -> None:
        self.namespace, self.name = namespace, name
        workers = {"nodes": nodes, "gpusPerNode": 0, "env": [{"name": "STUB", "value": stub}]}
        source = {"format": "procedural", "samples": 8}
        spec = {
            "image": image,
            "storage": {"volumeClaim": "data"},
            "model": {"preset": "tiny"},
            "workers": workers,
            "stages": [{"name": f"draw-{'abc'[i]}", "curate": {"sources": [source]}} for i in range(stages)],
        }
        metadata = {"name": name, "namespace": namespace}
        kubectl(
            "create",
            "-f",
            "-",
            body={"apiVersion": "sailvl.dev/v1alpha1", "kind": "SailVLRun", "metadata": metadata, "spec": spec},
        )

    def kubectl(self, *arguments: str) -> str:
        return kubectl("-n", self.namespace, *arguments)

    def stage_state(self) -> tuple[str, int]:
        """Return state and attempt of the first stage."""
        raw = json.loads(self.kubectl("get", "svr", self.name, "-o", "json"))
        stages = raw.get("status", {}).get("stages", [{}])
        return stages[0].get("state", ""), stages[0].get("attempt", 0)

    def condition(self, type_: str) -> dict[str, Any]:
        raw = json.loads(self.kubectl("get", "svr", self.name, "-o", "json"))
        conditions = raw.get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == type_ and c["status"] == "True"), {})

    def list_owned(self, kind: str) -> dict[str, str]:
        """Return the uid of each owned object of a kind, by name."""
        items = json.loads(self.kubectl("get", kind, "-l", f"sailvl.dev/run={self.name}", "-o", "json"))["items"]
        return {item["metadata"]["name"]: item["metadata"]["uid"] for item in items}

    def wait(self, condition: str, seconds: int = 60) -> None:
        self.kubectl("wait", f"--for=condition={condition}", f"svr/{self.name}", f"--timeout={seconds}s")


def test_run_succeeds_stage_by_stage(operator, namespace, image):
    run = KubectlRun(namespace, "whole", image, "succeed", nodes=2, stages=2)
    run.wait("Succeeded")
    assert set(run.list_owned("jobs")) == {"whole-draw-a-1", "whole-draw-b-1"}
    row = run.kubectl("get", "svr", "whole", "--no-headers")
    assert "100%" in row
    assert "Completed" in row
    reasons = run.kubectl("get", "events", "--field-selector", "involvedObject.name=whole", "-o", "jsonpath={..reason}")
    assert {"StageStarted", "StageSucceeded", "Completed"} <= set(reasons.split())


def test_config_error_fails_run_and_deletes_pods(operator, namespace, image):
    run = KubectlRun(namespace, "wrong", image, "config")
    run.wait("Failed")
    assert "preset huge is unknown" in run.condition("Failed")["message"]
    wait_until(lambda: not run.list_owned("jobs") and not run.list_owned("pods"))


def test_crash_starts_next_attempt(operator, namespace, image):
    run = KubectlRun(namespace, "crash", image, "crash-once", nodes=2)
    wait_until(lambda: run.stage_state() == ("Running", 2))
    assert set(run.list_owned("jobs")) == {"crash-draw-a-2"}
    run.kubectl("delete", "svr", "crash", "--wait=false")


def test_deleted_pod_starts_next_attempt(operator, namespace, image):
    run = KubectlRun(namespace, "evicted", image, "hold", nodes=2)
    wait_until(lambda: run.stage_state() == ("Running", 1))
    run.kubectl(
        "delete", "pod", "-l", "sailvl.dev/run=evicted,batch.kubernetes.io/job-completion-index=1", "--wait=false"
    )
    wait_until(lambda: run.stage_state() == ("Running", 2))
    wait_until(lambda: set(run.list_owned("jobs")) == {"evicted-draw-a-2"})
    run.kubectl("delete", "svr", "evicted", "--wait=false")


def test_suspend_deletes_pods_and_resume_starts_next_attempt(operator, namespace, image):
    run = KubectlRun(namespace, "pause", image, "hold")
    wait_until(lambda: run.stage_state() == ("Running", 1))
    run.kubectl("patch", "svr", "pause", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    run.wait("Suspended", 30)
    wait_until(lambda: not run.list_owned("pods"), 5)
    run.kubectl("patch", "svr", "pause", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    wait_until(lambda: run.stage_state() == ("Running", 2))
    run.kubectl("delete", "svr", "pause", "--wait=false")


def test_restarted_operator_duplicates_nothing(operator, namespace, image):
    run = KubectlRun(namespace, "steady", image, "hold", nodes=2)
    wait_until(lambda: run.stage_state() == ("Running", 1))
    jobs, pods = run.list_owned("jobs"), run.list_owned("pods")
    operator.stop(signal.SIGKILL)
    operator.start()
    wait_until(lambda: operator.read_metric("sailvl_operator_leading") == 1)
    wait_until(lambda: operator.read_metric("sailvl_operator_reconciles_total") >= 1)
    time.sleep(1)
    assert (run.list_owned("jobs"), run.list_owned("pods"), run.stage_state()) == (jobs, pods, ("Running", 1))

    operator.stop(signal.SIGKILL)
    run.kubectl("delete", "pod", "-l", "sailvl.dev/run=steady,batch.kubernetes.io/job-completion-index=0")
    operator.start()
    wait_until(lambda: run.stage_state() == ("Running", 2))
    wait_until(lambda: set(run.list_owned("jobs")) == {"steady-draw-a-2"})


def test_idle_operator_writes_nothing(operator, namespace, image):
    def count_writes() -> float:
        verbs = ("create", "patch", "delete", "deletecollection")
        return sum(
            operator.read_metric(f'sailvl_operator_api_calls_total{{code="{c}",verb="{v}"}}')
            for v in verbs
            for c in (200, 201)
        )

    time.sleep(1)
    before = count_writes()
    time.sleep(4)
    assert count_writes() == before


def test_deleted_run_removes_owned_objects(operator, namespace, image):
    run = KubectlRun(namespace, "gone", image, "hold", nodes=2)
    wait_until(lambda: run.stage_state() == ("Running", 1))
    wait_until(lambda: run.list_owned("services"))
    run.kubectl("delete", "svr", "gone")
    wait_until(lambda: not any(run.list_owned(kind) for kind in ("jobs", "pods", "services", "networkpolicies")))
    wait_until(lambda: operator.read_metric('sailvl_run_stage_attempt{namespace="' + namespace + '",run="gone"') == 0)
