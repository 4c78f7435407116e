"""The chart as its tests see it: where helm is, rendered objects, and the rights that the operator needs."""

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
"""What the chart is rendered for without a cluster."""

Right = tuple[str, str, str, str]
"""API group, resource, verb, name of the object (empty: all)"""


def _rights(group: str, resource: str, verbs: str, name: str = "") -> set[Right]:
    return {(group, resource, verb, name) for verb in verbs.split()}


RUN_RIGHTS = (
    _rights("sailvl.dev", "sailvlruns", "get list watch patch delete")
    | _rights("sailvl.dev", "sailvlruns/status", "patch")
    | _rights("sailvl.dev", "sailvlruns/finalizers", "update")
    | _rights("batch", "jobs", "get list watch create patch delete")
    | _rights("", "pods", "list watch deletecollection")
    | _rights("", "services", "get list watch create")
    | _rights("", "persistentvolumeclaims", "get create")
    | _rights("", "events", "create list")
    | _rights("kueue.x-k8s.io", "workloads", "list")
)
"""In every namespace that is served."""


def lease_rights(name: str) -> set[Right]:
    """In the release's namespace."""
    group, resource = "coordination.k8s.io", "leases"
    return _rights(group, resource, "create") | _rights(group, resource, "get update", name)


def flatten_rules(rules: list[dict[str, Any]]) -> set[Right]:
    """Rules of a Role, or of a review, one right each."""
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
    """The one in PATH, else the newest that hack/cluster/build.sh has built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = sorted(cache.glob("sailvl/bin/*/helm"), key=lambda path: path.stat().st_mtime)
    return shutil.which("helm") or (str(built[-1]) if built else None)


def run_helm(*args: str, kubeconfig: str = "") -> subprocess.CompletedProcess[str]:
    """Failures are the caller's."""
    helm = find_helm()
    assert helm is not None, "the test skips without helm"
    given = {"KUBECONFIG": kubeconfig or "/dev/null"}  # rendering asks no cluster
    return subprocess.run(
        [helm, *args], capture_output=True, text=True, check=False, timeout=300, env=os.environ | given
    )


def values_file(scenario: str) -> str:
    """Path of a ci scenario."""
    return str(CHART / "ci" / f"{scenario}-values.yaml")


@functools.cache
def render_text(scenario: str) -> str:
    """`helm template` of a ci scenario: release `train` in namespace `sail`."""
    done = run_helm(
        "template", "train", str(CHART), "-n", "sail", "--kube-version", KUBERNETES, "-f", values_file(scenario)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(scenario: str) -> list[dict[str, Any]]:
    """The same, parsed."""
    return [document for document in yaml.safe_load_all(render_text(scenario)) if document]


def find(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    [found] = [o for o in objects if o["kind"] == kind]
    return found


def get_pod(scenario: str) -> dict[str, Any]:
    template: dict[str, Any] = find(render(scenario), "Deployment")["spec"]["template"]
    return template
