"""The chart on a real API server: every object is taken, and an installed operator works with the rights it has."""

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
    RUN_RIGHTS,
    SCENARIOS,
    Right,
    find_helm,
    flatten_rules,
    lease_rights,
    run_helm,
    values_file,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"),
]

Kubectl = Callable[..., subprocess.CompletedProcess[str]]
RELEASE = "chart"
OPERATOR = f"{RELEASE}-sailvl-operator"
EVERYONE = {"authentication.k8s.io", "authorization.k8s.io"}
"""API groups of the reviews of oneself, which every account may ask for."""


def render_for(scenario: str, namespace: str) -> list[dict[str, Any]]:
    """The objects of a scenario as if installed in a namespace, and serving it alone where it serves some."""
    served = yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text()).get("watchNamespaces")
    flags = ["--set", f"watchNamespaces={{{namespace}}}"] if served else []
    done = run_helm(
        *("template", RELEASE, str(CHART), "-n", namespace, "--kube-version", "1.34.0"),
        *("-f", values_file(scenario), *flags),
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_server_takes_every_object(scenario: str, kubectl: Kubectl, namespace: str) -> None:
    listed = kubectl("api-resources", "--no-headers", "-o", "name")
    groups = {name.partition(".")[2] for name in listed.stdout.split()}
    objects = [o for o in render_for(scenario, namespace) if group_of(o) in groups]
    assert {"Deployment"} <= {o["kind"] for o in objects}
    text = yaml.safe_dump_all(objects)
    answer = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    assert answer.returncode == 0, answer.stderr
    assert "would violate PodSecurity" not in answer.stderr
    assert answer.stdout.count("(server dry run)") == len(objects)


def group_of(document: dict[str, Any]) -> str:
    group, _, version = document["apiVersion"].rpartition("/")
    return group if version else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A release in a namespace of its own, which it alone serves."""

    namespace: str
    kubectl: Kubectl

    def get(self, *words: str) -> Any:
        answer = self.kubectl("-n", self.namespace, "get", *words, "-o", "json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def get_items(self, *words: str) -> list[Any]:
        return list(self.get(*words)["items"])

    def create_run(self, name: str, **spec: Any) -> None:
        document = build_document(**spec)
        document["metadata"] = {"name": name, "namespace": self.namespace}
        answer = self.kubectl("create", "-f", "-", stdin=json.dumps(document))
        assert answer.returncode == 0, answer.stderr

    def pods(self) -> list[str]:
        selector = f"app.kubernetes.io/instance={RELEASE}"
        return [pod["metadata"]["name"] for pod in self.get("pods", "-l", selector)["items"]]

    def read_metrics(self, pod: str) -> str:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:8080/proxy/metrics"
        answer = self.kubectl("get", "--raw", path)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def review_rights(self, namespace: str) -> set[Right]:
        """What the operator's account may do in a namespace, in the server's words."""
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
        return {right for right in flatten_rules(status["resourceRules"]) if right[0] not in EVERYONE}


@pytest.fixture(scope="module")
def installed(cluster: Any, kubectl: Kubectl, resource: None) -> Iterator[Installed]:
    """`helm install` of the built image under the restricted Pod Security Standard, two replicas, and its end."""
    image = os.environ.get("SAILVL_OPERATOR_IMAGE")
    if not image:
        pytest.skip("SAILVL_OPERATOR_IMAGE names no image of the operator (`make images` builds one)")
    name = f"chart-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    assert kubectl("create", "namespace", name).returncode == 0
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        _install(image, name, cluster.kubeconfig)
        yield Installed(namespace=name, kubectl=kubectl)
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
        *(word for value in values for word in ("--set", value)),
        kubeconfig=kubeconfig,
    )
    assert done.returncode == 0, done.stderr
    assert f"{OPERATOR} serves the SailVLRuns of {namespace}." in done.stdout


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the condition says once it says something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)
    return found


def test_both_replicas_are_ready_and_one_leads(installed: Installed) -> None:
    assert installed.get("deployment", OPERATOR)["status"]["readyReplicas"] == 2
    pods = installed.pods()
    leading = [pod for pod in pods if "sailvl_operator_leading 1.0" in installed.read_metrics(pod)]
    assert [installed.get("lease", OPERATOR)["spec"]["holderIdentity"]] == leading
    assert len(pods) == 2


def test_an_unsupported_engine_is_refused_in_words(installed: Installed) -> None:
    installed.create_run("unsupported", engine={"name": "fsdp2"})
    waited = installed.kubectl(
        "-n", installed.namespace, "wait", "--for=condition=Failed", "svr/unsupported", "--timeout=60s"
    )
    assert waited.returncode == 0, waited.stderr
    conditions = installed.get("svr", "unsupported")["status"]["conditions"]
    [failed] = [c for c in conditions if c["type"] == "Failed"]
    assert failed["reason"] == "InvalidSpec"
    assert "spec.engine.name" in failed["message"]


def test_the_rights_suffice_for_a_runs_children(installed: Installed) -> None:
    """A claim that nothing binds: the children are made, and no worker ever starts."""
    template = {"storageClassName": "none", "accessModes": ["ReadWriteMany"]}
    storage = {"volumeClaimTemplate": template | {"resources": {"requests": {"storage": "1Gi"}}}}
    stages = [stage | {"workers": {"nodes": 2}} for stage in SPEC["stages"]]
    installed.create_run("children", storage=storage, stages=stages)
    selector = ("-l", "sailvl.dev/run=children")
    for kind in ("jobs", "services", "persistentvolumeclaims"):
        until(partial(installed.get_items, kind, *selector))
    until(lambda: installed.get_items("events", "--field-selector", "involvedObject.name=children"))
    patch = ("-n", installed.namespace, "patch", "svr", "children", "--type=merge", "-p")
    assert installed.kubectl(*patch, '{"spec": {"suspend": true}}').returncode == 0
    until(lambda: installed.get_items("jobs", *selector)[0]["spec"]["suspend"])
    metrics = "".join(installed.read_metrics(pod) for pod in installed.pods())
    assert 'sailvl_operator_api_calls_total{code="201",verb="create"}' in metrics
    assert 'code="403"' not in metrics, "a right is missing"


def test_the_account_may_do_no_more(installed: Installed) -> None:
    assert installed.review_rights(installed.namespace) == RUN_RIGHTS | lease_rights(OPERATOR)
    assert installed.review_rights("kube-system") == set()


def test_the_standby_takes_over(installed: Installed) -> None:
    leader = installed.get("lease", OPERATOR)["spec"]["holderIdentity"]
    installed.kubectl("-n", installed.namespace, "delete", "pod", leader, "--wait=false")
    standby = [pod for pod in installed.pods() if pod != leader]
    until(lambda: installed.get("lease", OPERATOR)["spec"]["holderIdentity"] not in (leader, ""), 40)
    assert installed.get("lease", OPERATOR)["spec"]["holderIdentity"] in [*standby, *installed.pods()]
    installed.create_run("later", engine={"zeroStage": 3})
    waited = installed.kubectl(
        "-n", installed.namespace, "wait", "--for=condition=Failed", "svr/later", "--timeout=60s"
    )
    assert waited.returncode == 0, waited.stderr
