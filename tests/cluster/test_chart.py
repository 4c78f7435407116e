"""The chart on a real API server: every object is accepted, and the installed operator's permissions suffice."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import yaml

from tests.support.builders.operator import SPEC, build_document
from tests.support.chart import (
    CHART,
    RUN_PERMISSIONS,
    SCENARIOS,
    Permission,
    build_lease_permissions,
    find_helm,
    flatten_rules,
    get_values_path,
    run_helm,
)
from tests.support.live.api import wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"),
]

Kubectl = Callable[..., subprocess.CompletedProcess[str]]
RELEASE = "chart"
OPERATOR = f"{RELEASE}-sailvl-operator"
SELF_REVIEW_GROUPS = {"authentication.k8s.io", "authorization.k8s.io"}
"""API groups of the self-reviews, which every account may create."""


def render_for(scenario: str, namespace: str) -> list[dict[str, Any]]:
    """Return the objects of a scenario, rendered for a namespace; a scenario with watchNamespaces watches only it."""
    watched = yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text()).get("watchNamespaces")
    flags = ["--set", f"watchNamespaces={{{namespace}}}"] if watched else []
    done = run_helm(
        *("template", RELEASE, str(CHART), "-n", namespace, "--kube-version", "1.34.0"),
        *("-f", get_values_path(scenario), *flags),
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_server_accepts_every_object(scenario: str, kubectl: Kubectl, namespace: str) -> None:
    listed = kubectl("api-resources", "--no-headers", "-o", "name")
    groups = {name.partition(".")[2] for name in listed.stdout.split()}
    objects = [o for o in render_for(scenario, namespace) if get_api_group(o) in groups]
    assert {"Deployment"} <= {o["kind"] for o in objects}
    text = yaml.safe_dump_all(objects)
    answer = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    assert answer.returncode == 0, answer.stderr
    assert "would violate PodSecurity" not in answer.stderr
    assert answer.stdout.count("(server dry run)") == len(objects)


@pytest.fixture
def roles(kubectl: Kubectl, namespace: str, resource: None) -> Iterator[None]:
    """Apply the chart's roles for users, and bind `view` to alice and `edit` to bob in the namespace."""
    text = yaml.safe_dump_all(
        o for o in render_for("default", namespace) if "aggregate" in json.dumps(o["metadata"].get("labels", {}))
    )
    assert kubectl("apply", "-f", "-", stdin=text).returncode == 0
    for user, role in (("alice", "view"), ("bob", "edit")):
        binding = ("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}")
        assert kubectl("-n", namespace, *binding).returncode == 0
    yield
    kubectl("delete", "-f", "-", stdin=text)


def test_users_may_edit_runs_but_not_write_their_status(kubectl: Kubectl, namespace: str, roles: None) -> None:
    def may(user: str, verb: str, *flags: str) -> bool:
        can_i = ("auth", "can-i", verb, "sailvlruns.sailvl.dev", f"--as={user}")
        return kubectl("-n", namespace, *can_i, *flags).stdout.strip() == "yes"

    wait_until(lambda: may("bob", "create") and may("bob", "list") and may("alice", "list"))  # roles are aggregated
    assert not may("alice", "create")
    for user in ("alice", "bob"):
        for verb in ("patch", "update"):
            assert not may(user, verb, "--subresource=status")


def get_api_group(document: dict[str, Any]) -> str:
    group, _, version = document["apiVersion"].rpartition("/")
    return group if version else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledChart:
    """A release in a namespace of its own, which is the only one it watches."""

    namespace: str
    kubectl: Kubectl

    def get(self, *arguments: str) -> Any:
        answer = self.kubectl("-n", self.namespace, "get", *arguments, "-o", "json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def get_items(self, *arguments: str) -> list[Any]:
        return list(self.get(*arguments)["items"])

    def create_run(self, name: str, **spec: Any) -> None:
        document = build_document(**spec)
        document["metadata"] = {"name": name, "namespace": self.namespace}
        answer = self.kubectl("create", "-f", "-", stdin=json.dumps(document))
        assert answer.returncode == 0, answer.stderr

    def list_pods(self) -> list[str]:
        selector = f"app.kubernetes.io/instance={RELEASE}"
        return [pod["metadata"]["name"] for pod in self.get("pods", "-l", selector)["items"]]

    def read_metrics(self, pod: str) -> str:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:8080/proxy/metrics"
        answer = self.kubectl("get", "--raw", path)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def review_permissions(self, namespace: str) -> set[Permission]:
        """Return the permissions of the operator's account in a namespace, as the API server reviews them."""
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        }
        user = f"--as=system:serviceaccount:{self.namespace}:{OPERATOR}"
        answer = self.kubectl("create", user, "--validate=false", "-f", "-", "-o", "json", stdin=json.dumps(review))
        assert answer.returncode == 0, answer.stderr
        status = json.loads(answer.stdout)["status"]
        assert not status.get("incomplete")
        return {
            permission
            for permission in flatten_rules(status["resourceRules"])
            if permission[0] not in SELF_REVIEW_GROUPS
        }


@pytest.fixture(scope="module")
def installed(cluster: Any, kubectl: Kubectl, resource: None) -> Iterator[InstalledChart]:
    """Install the chart with two replicas under the restricted Pod Security Standard, and uninstall it afterwards."""
    image = os.environ.get("SAILVL_OPERATOR_IMAGE")
    if not image:
        pytest.skip("SAILVL_OPERATOR_IMAGE names no image of the operator (`make images` builds one)")
    name = f"chart-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    assert kubectl("create", "namespace", name).returncode == 0
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        _install(image, name, cluster.kubeconfig)
        yield InstalledChart(namespace=name, kubectl=kubectl)
        removed = run_helm(
            "uninstall", RELEASE, "-n", name, "--wait", "--timeout", "90s", kubeconfig=cluster.kubeconfig
        )
        assert removed.returncode == 0, removed.stderr
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def _install(image: str, namespace: str, kubeconfig: str) -> None:
    repository, _, tag = image.rpartition(":")
    values = [
        f"image.repository={repository}",
        f"image.tag={tag}",
        f"watchNamespaces={{{namespace}}}",
        "resources.requests.cpu=10m",
        "metrics.dashboard.enabled=true",
    ]
    done = run_helm(
        *("install", RELEASE, str(CHART), "-n", namespace, "--skip-crds", "--wait", "--timeout", "180s"),
        *(argument for value in values for argument in ("--set", value)),
        kubeconfig=kubeconfig,
    )
    assert done.returncode == 0, done.stderr
    assert f"{OPERATOR} watches the SailVLRuns of {namespace}" in done.stdout


def test_both_replicas_are_ready_and_one_leads(installed: InstalledChart) -> None:
    assert installed.get("deployment", OPERATOR)["status"]["readyReplicas"] == 2
    pods = installed.list_pods()
    leading = [pod for pod in pods if "sailvl_operator_leading 1.0" in installed.read_metrics(pod)]
    assert [installed.get("lease", OPERATOR)["spec"]["holderIdentity"]] == leading
    assert len(pods) == 2


def test_unsupported_engine_fails_run_with_message(installed: InstalledChart) -> None:
    installed.create_run("unsupported", engine={"name": "fsdp2"})
    waited = installed.kubectl(
        "-n", installed.namespace, "wait", "--for=condition=Failed", "svr/unsupported", "--timeout=60s"
    )
    assert waited.returncode == 0, waited.stderr
    conditions = installed.get("svr", "unsupported")["status"]["conditions"]
    [failed] = [c for c in conditions if c["type"] == "Failed"]
    assert failed["reason"] == "InvalidSpec"
    assert "spec.engine.name" in failed["message"]


def test_permissions_suffice_for_owned_objects(installed: InstalledChart) -> None:
    """Use a claim that nothing binds, so that all objects are created but no worker starts."""
    template = {"storageClassName": "none", "accessModes": ["ReadWriteMany"]}
    storage = {"volumeClaimTemplate": template | {"resources": {"requests": {"storage": "1Gi"}}}}
    stages = [stage | {"workers": {"nodes": 2}} for stage in SPEC["stages"]]
    installed.create_run("owned-objects", storage=storage, stages=stages)
    selector = ("-l", "sailvl.dev/run=owned-objects")
    for kind in ("jobs", "services", "networkpolicies", "persistentvolumeclaims"):
        wait_until(partial(installed.get_items, kind, *selector))
    wait_until(lambda: installed.get_items("events", "--field-selector", "involvedObject.name=owned-objects"))
    patch = ("-n", installed.namespace, "patch", "svr", "owned-objects", "--type=merge", "-p")
    assert installed.kubectl(*patch, '{"spec": {"suspend": true}}').returncode == 0
    wait_until(lambda: installed.get_items("jobs", *selector)[0]["spec"]["suspend"])
    metrics = "".join(installed.read_metrics(pod) for pod in installed.list_pods())
    assert 'sailvl_operator_api_calls_total{code="201",verb="create"}' in metrics
    assert 'code="403"' not in metrics, "a permission is missing"


def test_account_has_no_other_permissions(installed: InstalledChart) -> None:
    assert installed.review_permissions(installed.namespace) == RUN_PERMISSIONS | build_lease_permissions(OPERATOR)
    assert installed.review_permissions("kube-system") == set()


def test_standby_takes_over_from_deleted_leader(installed: InstalledChart) -> None:
    leader = installed.get("lease", OPERATOR)["spec"]["holderIdentity"]
    installed.kubectl("-n", installed.namespace, "delete", "pod", leader, "--wait=false")
    standby = [pod for pod in installed.list_pods() if pod != leader]
    wait_until(lambda: installed.get("lease", OPERATOR)["spec"]["holderIdentity"] not in (leader, ""), 40)
    assert installed.get("lease", OPERATOR)["spec"]["holderIdentity"] in [*standby, *installed.list_pods()]
    installed.create_run("later", engine={"zeroStage": 3})
    waited = installed.kubectl(
        "-n", installed.namespace, "wait", "--for=condition=Failed", "svr/later", "--timeout=60s"
    )
    assert waited.returncode == 0, waited.stderr
