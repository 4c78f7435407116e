"""The operator's installation for the fault tests: its chart, watching one namespace."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.faults.environment.api import ClusterReader
from tests.faults.runs.spec import HIGH_PRIORITY, LOW_PRIORITY
from tests.support.live.cluster import ROOT, Kubectl
from tests.support.live.whole_run import require_success

NAMESPACE, SYSTEM, RELEASE = "sailvl-faults", "sailvl-faults-system", "sailvl-faults"


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """Where the tests create runs, and with what."""

    kubectl: Kubectl
    api: ClusterReader
    trainer_image: str
    namespace: str = NAMESPACE
    system_namespace: str = SYSTEM


def install(kubectl: Kubectl, kubeconfig: str, operator_image: str, trainer_image: str) -> None:
    """Install the chart; both namespaces enforce the restricted Pod Security Standard."""
    for name in (SYSTEM, NAMESPACE):
        require_success(kubectl("create", "namespace", name))
        require_success(kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"))
    require_success(kubectl("apply", "-f", "-", stdin=json.dumps(build_priorities())))
    require_success(kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/sailvlruns.yaml")))
    repository, _, tag = operator_image.rpartition(":")
    values = {
        "image": {"repository": repository, "tag": tag},
        "runs": {"trainerImage": trainer_image},
        "watchNamespaces": [NAMESPACE],
    }
    command = [
        "helm",
        f"--kubeconfig={kubeconfig}",
        "-n",
        SYSTEM,
        "install",
        RELEASE,
        str(ROOT / "helm/sailvl-operator"),
    ]
    command += ["--skip-crds", "--wait", "--timeout=300s", "-f", "-"]
    done = subprocess.run(command, input=json.dumps(values), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr + kubectl("-n", SYSTEM, "describe", "pods").stdout[-3000:]


def build_priorities() -> dict[str, Any]:
    """Return the PriorityClasses of the runs and of the pod that preempts them."""
    base = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "description": "Used by the fault tests."}
    values = {LOW_PRIORITY: -10, HIGH_PRIORITY: 1000}
    items = [base | {"metadata": {"name": name}, "value": value} for name, value in values.items()]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def remove(kubectl: Kubectl, kubeconfig: str) -> None:
    """Remove the installation and everything else that a test leaves behind."""
    command = ["helm", f"--kubeconfig={kubeconfig}", "-n", SYSTEM, "uninstall", RELEASE, "--ignore-not-found"]
    subprocess.run(command, capture_output=True, check=False)
    kubectl("-n", NAMESPACE, "delete", "svr", "--all", "--timeout=60s")
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--ignore-not-found", "--timeout=100s")
    kubectl("delete", "pv", "-l", f"sailvl-test={NAMESPACE}", "--timeout=30s")
    kubectl("delete", "priorityclass", LOW_PRIORITY, HIGH_PRIORITY, "--ignore-not-found")
