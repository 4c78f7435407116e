"""Helm, rendered objects of the chart, and the permissions that the operator needs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm/sailvl-operator"
SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
KUBERNETES = "1.34.0"
"""Kubernetes version that the chart is rendered for."""

Permission = tuple[str, str, str, str]
"""API group, resource, verb, and name of the object, empty for all."""


def _permissions(group: str, resource: str, verbs: str, name: str = "") -> set[Permission]:
    return {(group, resource, verb, name) for verb in verbs.split()}


RUN_PERMISSIONS = (
    _permissions("sailvl.dev", "sailvlruns", "get list watch patch delete")
    | _permissions("sailvl.dev", "sailvlruns/status", "patch")
    | _permissions("sailvl.dev", "sailvlruns/finalizers", "update")
    | _permissions("batch", "jobs", "get list watch create patch delete")
    | _permissions("", "pods", "list watch deletecollection")
    | _permissions("", "services", "get list watch create")
    | _permissions("networking.k8s.io", "networkpolicies", "get list watch create patch delete")
    | _permissions("", "persistentvolumeclaims", "get create")
    | _permissions("", "events", "create list")
    | _permissions("kueue.x-k8s.io", "workloads", "list")
)
"""Permissions in every watched namespace."""


def build_lease_permissions(name: str) -> set[Permission]:
    """Return the permissions in the release's namespace."""
    group, resource = "coordination.k8s.io", "leases"
    return _permissions(group, resource, "create") | _permissions(group, resource, "get update", name)


def flatten_rules(rules: list[dict[str, Any]]) -> set[Permission]:
    """Return the single permissions of the rules of a Role or a review."""
    return {
        (group, resource, verb, name)
        for rule in rules
        for group in rule.get("apiGroups", [])
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or [""]
    }


@functools.cache
def find_helm() -> str | None:
    """Return helm in PATH, else the newest that hack/cluster/build.sh has built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = sorted(cache.glob("sailvl/bin/*/helm"), key=lambda path: path.stat().st_mtime)
    return shutil.which("helm") or (str(built[-1]) if built else None)


def run_helm(*args: str, kubeconfig: str = "") -> subprocess.CompletedProcess[str]:
    """Run helm without a cluster unless a kubeconfig is given; it does not raise on failures."""
    helm = find_helm()
    assert helm is not None, "the test is skipped without helm"
    variables = {"KUBECONFIG": kubeconfig or "/dev/null"}  # rendering needs no cluster
    return subprocess.run(
        [helm, *args], capture_output=True, text=True, check=False, timeout=300, env=os.environ | variables
    )


def get_values_path(scenario: str) -> str:
    """Return the path of a CI scenario's values."""
    return str(CHART / "ci" / f"{scenario}-values.yaml")


@functools.cache
def render_text(scenario: str) -> str:
    """Render a CI scenario as release `train` in namespace `sail`."""
    done = run_helm(
        "template", "train", str(CHART), "-n", "sail", "--kube-version", KUBERNETES, "-f", get_values_path(scenario)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(scenario: str) -> list[dict[str, Any]]:
    """Render a CI scenario and parse its objects."""
    return [document for document in yaml.safe_load_all(render_text(scenario)) if document]


def find_object(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the only object of a kind."""
    [found] = [o for o in objects if o["kind"] == kind]
    return found


def get_pod_template(scenario: str) -> dict[str, Any]:
    """Return the pod template of a scenario's Deployment."""
    template: dict[str, Any] = find_object(render(scenario), "Deployment")["spec"]["template"]
    return template
