"""The chart, rendered by helm without a cluster: the objects of each ci scenario, and values that it rejects."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.types import Defaults
from sailvl_operator.cli.operator import add_arguments
from sailvl_operator.options import read_settings
from sailvl_operator.settings import (
    ApiSettings,
    ControllerSettings,
    HealthSettings,
    LeaseSettings,
    OperatorSettings,
)
from tests.support.chart import (
    CHART,
    KUBERNETES,
    RUN_PERMISSIONS,
    SCENARIOS,
    build_lease_permissions,
    find_helm,
    flatten_rules,
    get_pod_template,
    get_values_path,
    render,
    run_helm,
)

pytestmark = pytest.mark.skipif(
    find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"
)

LEASE = ["Role", "RoleBinding"]
ALWAYS = ["Deployment", "Service", "ServiceAccount", "NetworkPolicy", *LEASE]
AGGREGATED = ["ClusterRole", "ClusterRole"]
KINDS = {
    "default": [*ALWAYS, *AGGREGATED, "ClusterRole", "ClusterRoleBinding", "PodDisruptionBudget"],
    "namespaced": [*ALWAYS, *AGGREGATED, *LEASE, *LEASE],
    "monitored": [
        *ALWAYS,
        *AGGREGATED,
        "ClusterRole",
        "ClusterRoleBinding",
        "PodDisruptionBudget",
        "ServiceMonitor",
        "PodMonitor",
        "PrometheusRule",
        "ConfigMap",
    ],
    "everything": ["Deployment", "ServiceAccount", *LEASE, *LEASE, "ConfigMap"],
    "given-rights": ["Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_chart_passes_helm_lint(scenario: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), "--kube-version", KUBERNETES, "-f", get_values_path(scenario))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_renders_expected_kinds(scenario: str) -> None:
    assert Tally(o["kind"] for o in render(scenario)) == Tally(KINDS[scenario])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_has_namespace_and_instance_label(scenario: str) -> None:
    for o in render(scenario):
        is_cluster_wide = o["kind"].startswith("Cluster")
        assert ("namespace" in o["metadata"]) is not is_cluster_wide, o["metadata"]["name"]
        assert o["metadata"]["labels"]["app.kubernetes.io/instance"] == "train"


def test_crd_of_the_chart_is_the_generated_one() -> None:
    assert [path.name for path in (CHART / "crds").iterdir()] == ["sailvlruns.yaml"]
    generated = CHART.parents[1] / "crds/sailvlruns.yaml"
    assert (CHART / "crds/sailvlruns.yaml").read_bytes() == generated.read_bytes(), "copy it: make generate"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pod_meets_the_restricted_security_standard(scenario: str) -> None:
    spec = get_pod_template(scenario)["spec"]
    [container] = spec["containers"]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_probes_and_service_use_the_same_port(scenario: str) -> None:
    [container] = get_pod_template(scenario)["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": HealthSettings().port, "protocol": "TCP"}]
    probes = {name: container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe", "startupProbe")}
    assert probes == {
        "livenessProbe": {"path": "/healthz", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
        "startupProbe": {"path": "/healthz", "port": "http"},
    }
    for service in (o for o in render(scenario) if o["kind"] == "Service"):
        assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http", "protocol": "TCP"}]


def lease(name: str, **fields: Any) -> LeaseSettings:
    return LeaseSettings(name=name, namespace="sail", identity="pod", **fields)


def build_peer(namespace: str, **pod_labels: str) -> dict[str, Any]:
    """Return a NetworkPolicyPeer: pods of a namespace that have some labels."""
    return {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "podSelector": {"matchLabels": pod_labels},
    }


OPERATOR_PEER = build_peer(
    "sail", **{"app.kubernetes.io/name": "sailvl-operator", "app.kubernetes.io/instance": "train"}
)
SETTINGS = {
    "default": OperatorSettings(
        lease=lease("train-sailvl-operator"), defaults=Defaults(metrics_peers=(OPERATOR_PEER,))
    ),
    "monitored": OperatorSettings(
        lease=lease("train-sailvl-operator"),
        defaults=Defaults(
            metrics_peers=(OPERATOR_PEER, build_peer("monitoring", **{"app.kubernetes.io/name": "prometheus"}))
        ),
    ),
    "namespaced": OperatorSettings(
        api=ApiSettings(namespaces=("team-a", "team-b")),
        lease=lease("train-sailvl-operator"),
        defaults=Defaults(image="registry.example.com/sailvl-trainer:0.1.0", metrics_peers=(OPERATOR_PEER,)),
    ),
    "everything": OperatorSettings(
        api=ApiSettings(namespaces=("team-a",), events=False),
        controller=ControllerSettings(
            workers=32,
            progress_interval_seconds=0,
            diagnostics_interval_seconds=20,
            watch_audit_interval_seconds=120,
        ),
        lease=lease("sail-trainer", duration_seconds=30, renew_deadline_seconds=20, renew_interval_seconds=5),
        defaults=Defaults(
            image="registry.example.com/sailvl-trainer:0.1.0",
            network_policies=False,
            metrics_peers=(
                build_peer("sail", **{"app.kubernetes.io/name": "sail", "app.kubernetes.io/instance": "train"}),
                build_peer("observability", app="prometheus"),
            ),
            grace_seconds=300,
            failure_settle_seconds=1.5,
            backoff_seconds=20,
            backoff_limit_seconds=1_000_000,
        ),
        allowed=AllowLists(
            images=("registry.example.com/sail", "localhost:5000"),
            priority_classes=("batch", "low"),
            toleration_keys=("nvidia.com/gpu",),
            service_accounts=("trainer",),
            server_hosts=("judge.team.svc:8000",),
        ),
        log_level="DEBUG",
        log_format="text",
    ),
}


@pytest.mark.parametrize("scenario", SETTINGS)
def test_flags_are_parsed_into_the_expected_settings(scenario: str) -> None:
    [container] = get_pod_template(scenario)["spec"]["containers"]
    assert "command" not in container, "the image's entrypoint is `sailvl`"
    verb, *flags = container["args"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = read_settings(parser.parse_args(flags), {"SAILVL_OPERATOR_IDENTITY": "pod"})
    assert (verb, given) == ("operator", SETTINGS[scenario])


@pytest.mark.parametrize(
    ("scenario", "image"),
    [
        ("default", "sailvl-operator:0.1.0"),
        ("namespaced", "registry.example.com/sailvl-operator:0.1.0"),
        ("everything", f"registry.example.com/sailvl-operator@sha256:{'0123456789abcdef' * 4}"),
    ],
)
def test_image_reference(scenario: str, image: str) -> None:
    assert get_pod_template(scenario)["spec"]["containers"][0]["image"] == image


def test_user_values_are_passed_to_the_pod() -> None:
    values = yaml.safe_load(Path(get_values_path("everything")).read_text())
    template = get_pod_template("everything")
    passed = ("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName")
    assert {name: template["spec"][name] for name in passed} == {name: values[name] for name in passed}
    assert template["spec"]["imagePullSecrets"] == values["imagePullSecrets"]
    assert {name: template["spec"]["containers"][0][name] for name in ("env", "resources")} == {
        name: values[name] for name in ("env", "resources")
    }
    assert template["metadata"]["labels"]["team"] == "vision"
    assert template["metadata"]["annotations"] == values["podAnnotations"]


def rights_by_namespace(scenario: str) -> dict[str, Any]:
    """Return the rules of the service account of the pods by namespace; "" stands for the whole cluster."""
    objects = render(scenario)
    rules = {(o["kind"], o["metadata"]["name"], o["metadata"].get("namespace", "")): o.get("rules") for o in objects}
    account = {
        "kind": "ServiceAccount",
        "name": get_pod_template(scenario)["spec"]["serviceAccountName"],
        "namespace": "sail",
    }
    found: dict[str, Any] = {}
    for binding in (o for o in objects if o["kind"].endswith("RoleBinding")):
        assert binding["subjects"] == [account]
        namespace = binding["metadata"].get("namespace", "")
        role = rules[(binding["roleRef"]["kind"], binding["roleRef"]["name"], namespace)]
        found.setdefault(namespace, set()).update(flatten_rules(role))
    return found


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("default", {"": RUN_PERMISSIONS, "sail": build_lease_permissions("train-sailvl-operator")}),
        (
            "namespaced",
            {
                "team-a": RUN_PERMISSIONS,
                "team-b": RUN_PERMISSIONS,
                "sail": build_lease_permissions("train-sailvl-operator"),
            },
        ),
        ("everything", {"team-a": RUN_PERMISSIONS, "sail": build_lease_permissions("sail-trainer")}),
        ("given-rights", {}),
    ],
)
def test_rbac_rules_by_namespace(scenario: str, expected: dict[str, Any]) -> None:
    assert rights_by_namespace(scenario) == expected


def test_roles_for_users_are_aggregated_without_the_status() -> None:
    roles = {
        o["metadata"]["name"]: o
        for o in render("default")
        if o["kind"] == "ClusterRole" and ":" in o["metadata"]["name"]
    }
    view, edit = (roles[f"sail:train-sailvl-operator:{name}"] for name in ("view", "edit"))
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    targets = [{k.removeprefix(prefix) for k in o["metadata"]["labels"] if k.startswith(prefix)} for o in (view, edit)]
    assert targets == [{"view"}, {"edit", "admin"}]
    assert flatten_rules(view["rules"]) == {("sailvl.dev", "sailvlruns", verb, "") for verb in ("get", "list", "watch")}
    assert flatten_rules(edit["rules"]) == {
        ("sailvl.dev", "sailvlruns", verb, "") for verb in ("create", "update", "patch", "delete", "deletecollection")
    }


PROMETHEUS_RULE = {
    "from": [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
        }
    ],
    "ports": [{"port": "http", "protocol": "TCP"}],
}


@pytest.mark.parametrize(("scenario", "ingress"), [("default", []), ("monitored", [PROMETHEUS_RULE])])
def test_operator_accepts_connections_from_prometheus_alone(scenario: str, ingress: list[Any]) -> None:
    [policy] = [o["spec"] for o in render(scenario) if o["kind"] == "NetworkPolicy"]
    labels = get_pod_template(scenario)["metadata"]["labels"]
    assert policy.pop("podSelector")["matchLabels"].items() <= labels.items()
    assert policy == {"policyTypes": ["Ingress"], "ingress": ingress}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pod_uses_the_service_account(scenario: str) -> None:
    accounts = [o["metadata"]["name"] for o in render(scenario) if o["kind"] == "ServiceAccount"]
    assert get_pod_template(scenario)["spec"]["serviceAccountName"] in (accounts or ["given"])


INVALID_VALUES = [
    pytest.param("replica=2", "additional properties 'replica' not allowed", id="unknown value"),
    pytest.param("image.repo=x", "additional properties 'repo' not allowed", id="unknown nested value"),
    pytest.param("image.tag=a/b", "/image/tag", id="tag with a slash"),
    pytest.param("image.repository=", "/image/repository", id="empty repository"),
    pytest.param("image.digest=sha256:12", "/image/digest", id="short digest"),
    pytest.param("image.pullPolicy=Sometimes", "/image/pullPolicy", id="unknown pull policy"),
    pytest.param("replicas=-1", "/replicas", id="negative replicas"),
    pytest.param("replicas=two", "/replicas", id="replicas is a string"),
    pytest.param("watchNamespaces={team-a,team-a}", "/watchNamespaces", id="duplicate namespace"),
    pytest.param("watchNamespaces={Team}", "/watchNamespaces/0", id="uppercase namespace"),
    pytest.param("runs.graceSeconds=0", "/runs/graceSeconds", id="zero grace period"),
    pytest.param("allowed.images={registry.example.com/*}", "/allowed/images/0", id="wildcard in an allow-list"),
    pytest.param("allowed.serverHosts={http://judge}", "/allowed/serverHosts/0", id="scheme in an allow-list"),
    pytest.param("allowed.images={registry.example.com:}", "/allowed/images/0", id="colon without a port"),
    pytest.param("allowed.images={Registry.example.com}", "/allowed/images/0", id="registry in upper case"),
    pytest.param("allowed.images={registry.example.com/x:1}", "/allowed/images/0", id="tag in an allow-list"),
    pytest.param("allowed.priorityClasses={Batch}", "/allowed/priorityClasses/0", id="class in upper case"),
    pytest.param("allowed.tolerationKeys={gpu=true}", "/allowed/tolerationKeys/0", id="value of a taint"),
    pytest.param("allowed.serviceAccounts={team/trainer}", "/allowed/serviceAccounts/0", id="account with a namespace"),
    pytest.param("allowed.serverHosts={judge/v1}", "/allowed/serverHosts/0", id="path in an allow-list"),
    pytest.param("operator.logLevel=LOUD", "/operator/logLevel", id="unknown log level"),
    pytest.param("operator.events=maybe", "/operator/events", id="events is a string"),
    pytest.param("resources.limits.memory=lots", "/resources/limits/memory", id="quantity is not a number"),
    pytest.param(
        "podLabels.app\\.kubernetes\\.io/managed-by=sailvl-operator", "invalid propertyName", id="reserved pod label"
    ),
    pytest.param(
        "metrics.serviceMonitor.enabled=true",
        "keeps Prometheus from it; set networkPolicy.prometheus.namespace",
        id="ServiceMonitor behind a NetworkPolicy without Prometheus",
    ),
    pytest.param("networkPolicy.runs=maybe", "/networkPolicy/runs", id="network policies is a string"),
    pytest.param(
        "networkPolicy.prometheus.namespace=Team", "/networkPolicy/prometheus/namespace", id="uppercase Prometheus"
    ),
    pytest.param(
        "metrics.podMonitor.enabled=true",
        "set networkPolicy.prometheus.namespace",
        id="PodMonitor without the namespace of Prometheus",
    ),
    pytest.param("metrics.podMonitor.interval=often", "/metrics/podMonitor/interval", id="interval is not a duration"),
    pytest.param(
        "metrics.prometheusRule.enabled=true", "/metrics/serviceMonitor/enabled", id="alerts without a ServiceMonitor"
    ),
    pytest.param(
        "leaderElection.renewDeadlineSeconds=15",
        "set it below durationSeconds, 15",
        id="renew deadline not below duration",
    ),
]


@pytest.mark.parametrize(("value", "message"), INVALID_VALUES)
def test_invalid_value_is_rejected(value: str, message: str) -> None:
    done = run_helm("template", "train", str(CHART), "--kube-version", KUBERNETES, "--set", value)
    assert done.returncode != 0
    assert message in done.stderr


def render_notes(tmp_path: Path, *values: str) -> str:
    """Render NOTES.txt, which `helm template` leaves out, as a ConfigMap of a copy of the chart."""
    shutil.copytree(CHART, tmp_path / "chart")
    templates = tmp_path / "chart/templates"
    (templates / "NOTES.txt").rename(tmp_path / "chart/notes")
    (templates / "notes.yaml").write_text('{{ dict "kind" "Notes" "text" (tpl (.Files.Get "notes") .) | toYaml }}')
    flags = [part for value in values for part in ("--set", value)]
    done = run_helm("template", "train", str(tmp_path / "chart"), "--kube-version", KUBERNETES, *flags)
    assert done.returncode == 0, done.stderr
    [notes] = [document for document in yaml.safe_load_all(done.stdout) if document["kind"] == "Notes"]
    return str(notes["text"])


def test_notes_warn_of_empty_allow_lists(tmp_path: Path) -> None:
    notes = render_notes(tmp_path, "allowed.images={registry.example.com}", "allowed.serviceAccounts=null")
    lists = "allowed.priorityClasses, allowed.tolerationKeys, allowed.serviceAccounts, allowed.serverHosts"
    assert f"WARNING: {lists} are empty lists, so runs may name anything there." in notes


def test_notes_warn_of_no_allow_list_if_all_have_entries(tmp_path: Path) -> None:
    lists = ("images", "priorityClasses", "serverHosts", "serviceAccounts", "tolerationKeys")
    assert "WARNING" not in render_notes(tmp_path, *(f"allowed.{name}={{a}}" for name in lists))


def test_unsupported_kubernetes_version_is_rejected() -> None:
    done = run_helm("template", "train", str(CHART), "--kube-version", "1.32.0")
    assert "chart requires kubeVersion" in done.stderr


def list_names(schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the path of every value in the schema."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    for name, below in schema.get("properties", {}).items() if schema.get("type") == "object" else ():
        yield f"{path}{name}"
        yield from list_names(below, root, f"{path}{name}.")


def test_values_and_schema_have_the_same_fields() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def is_set(path: str) -> bool:
        node: Any = values
        for part in path.split("."):
            if part not in node:
                return False
            node = node[part]
        return True

    assert [path for path in list_names(schema, schema) if not is_set(path)] == ["global"]
