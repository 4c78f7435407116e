"""The operator for the fault tests: its chart, installed for one namespace."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.faults.api import Api
from tests.faults.recipe import HIGH_PRIORITY, LOW_PRIORITY
from tests.support.live.cluster import ROOT, Kubectl
from tests.support.live.whole_run import must

NAMESPACE, SYSTEM, RELEASE = "sailvl-faults", "sailvl-faults-system", "sailvl-faults"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where runs are made."""

    kubectl: Kubectl
    api: Api
    trainer_image: str
    namespace: str = NAMESPACE
    system: str = SYSTEM


def install(kubectl: Kubectl, kubeconfig: str, operator_image: str, trainer_image: str) -> None:
    """Both namespaces enforce the restricted Pod Security Standard."""
    for name in (SYSTEM, NAMESPACE):
        must(kubectl("create", "namespace", name))
        must(kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"))
    must(kubectl("apply", "-f", "-", stdin=json.dumps(build_priorities())))
    must(kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/sailvlruns.yaml")))
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
    """Of the runs, and of what takes their place."""
    base = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "description": "Of the tests of faults."}
    values = {LOW_PRIORITY: -10, HIGH_PRIORITY: 1000}
    items = [base | {"metadata": {"name": name}, "value": value} for name, value in values.items()]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def remove(kubectl: Kubectl, kubeconfig: str) -> None:
    """Whatever an earlier test left."""
    command = ["helm", f"--kubeconfig={kubeconfig}", "-n", SYSTEM, "uninstall", RELEASE, "--ignore-not-found"]
    subprocess.run(command, capture_output=True, check=False)
    kubectl("-n", NAMESPACE, "delete", "svr", "--all", "--timeout=60s")
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--ignore-not-found", "--timeout=100s")
    kubectl("delete", "pv", "-l", f"sailvl-test={NAMESPACE}", "--timeout=30s")
    kubectl("delete", "priorityclass", LOW_PRIORITY, HIGH_PRIORITY, "--ignore-not-found")
