"""The chart, rendered by helm without a cluster: what it makes of each ci scenario, what it refuses, what it names."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from builders import build_run
from charts import (
    CHART,
    KUBERNETES,
    RUN_RIGHTS,
    SCENARIOS,
    find,
    find_helm,
    flatten_rules,
    lease_rights,
    render,
    render_text,
    run_helm,
    values_file,
)
from sailvl_operator.api import names
from sailvl_operator.api.status import Goodput, StageProgress, StageStatus, Status
from sailvl_operator.cli.operator import add_arguments
from sailvl_operator.core.desired.metadata import build_attempt_labels
from sailvl_operator.core.desired.service import build_service
from sailvl_operator.core.plan import Defaults
from sailvl_operator.metrics import Metrics, OperatorCollector, RunCollector
from sailvl_operator.settings import (
    ApiSettings,
    LeaseSettings,
    ProgressSettings,
    QueueSettings,
    ServerSettings,
    Settings,
    read_settings,
)
from sailvl_trainer.runtime.metrics import TrainerMetrics

pytestmark = pytest.mark.skipif(
    find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"
)

LEASE = ["Role", "RoleBinding"]
ALWAYS = ["Deployment", "Service", "ServiceAccount", *LEASE]
KINDS = {
    "default": [*ALWAYS, "ClusterRole", "ClusterRoleBinding", "PodDisruptionBudget"],
    "namespaced": [*ALWAYS, *LEASE, *LEASE],
    "monitored": [
        *ALWAYS,
        "ClusterRole",
        "ClusterRoleBinding",
        "PodDisruptionBudget",
        "ServiceMonitor",
        "PodMonitor",
        "PrometheusRule",
        "ConfigMap",
    ],
    "everything": ["Deployment", "ServiceAccount", *LEASE, *LEASE, "ConfigMap"],
    "given-rights": ["Deployment", "Service", "PodDisruptionBudget"],
}


def get_pod(scenario: str) -> dict[str, Any]:
    template: dict[str, Any] = find(render(scenario), "Deployment")["spec"]["template"]
    return template


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lint(scenario: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), "--kube-version", KUBERNETES, "-f", values_file(scenario))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kinds(scenario: str) -> None:
    assert Tally(o["kind"] for o in render(scenario)) == Tally(KINDS[scenario])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_says_where_it_belongs(scenario: str) -> None:
    for o in render(scenario):
        is_cluster_wide = o["kind"].startswith("Cluster")
        assert ("namespace" in o["metadata"]) is not is_cluster_wide, o["metadata"]["name"]
        assert o["metadata"]["labels"]["app.kubernetes.io/instance"] == "train"


def test_the_definition_is_the_generated_one() -> None:
    assert [path.name for path in (CHART / "crds").iterdir()] == ["sailvlruns.yaml"]
    generated = CHART.parents[1] / "crds/sailvlruns.yaml"
    assert (CHART / "crds/sailvlruns.yaml").read_bytes() == generated.read_bytes(), "copy it: make generate"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_pod_is_restricted(scenario: str) -> None:
    spec = get_pod(scenario)["spec"]
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
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_probes_and_the_service_share_the_port(scenario: str) -> None:
    [container] = get_pod(scenario)["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": ServerSettings().port, "protocol": "TCP"}]
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


SETTINGS = {
    "default": Settings(lease=lease("train-sailvl-operator")),
    "namespaced": Settings(
        api=ApiSettings(namespaces=("team-a", "team-b")),
        lease=lease("train-sailvl-operator"),
        defaults=Defaults(image="registry.example.com/sailvl-trainer:0.1.0"),
    ),
    "everything": Settings(
        api=ApiSettings(namespaces=("team-a",), events=False),
        queue=QueueSettings(workers=32),
        progress=ProgressSettings(interval=0),
        lease=lease("sail-trainer", duration=30, renew_deadline=20, renew_interval=5),
        defaults=Defaults(
            image="registry.example.com/sailvl-trainer:0.1.0",
            grace_seconds=300,
            settle_seconds=1.5,
            backoff_seconds=20,
            backoff_limit_seconds=1_000_000,
        ),
        log_level="DEBUG",
        log_format="text",
    ),
}


@pytest.mark.parametrize("scenario", SETTINGS)
def test_the_operator_reads_its_flags(scenario: str) -> None:
    [container] = get_pod(scenario)["spec"]["containers"]
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
def test_the_image(scenario: str, image: str) -> None:
    assert get_pod(scenario)["spec"]["containers"][0]["image"] == image


def test_what_a_user_adds_to_the_pod() -> None:
    values = yaml.safe_load(Path(values_file("everything")).read_text())
    template = get_pod("everything")
    passed = ("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName")
    assert {name: template["spec"][name] for name in passed} == {name: values[name] for name in passed}
    assert template["spec"]["imagePullSecrets"] == values["imagePullSecrets"]
    assert {name: template["spec"]["containers"][0][name] for name in ("env", "resources")} == {
        name: values[name] for name in ("env", "resources")
    }
    assert template["metadata"]["labels"]["team"] == "vision"
    assert template["metadata"]["annotations"] == values["podAnnotations"]


def rights_by_namespace(scenario: str) -> dict[str, Any]:
    """Of the service account that the pods run as; "" is the whole cluster."""
    objects = render(scenario)
    rules = {(o["kind"], o["metadata"]["name"], o["metadata"].get("namespace", "")): o.get("rules") for o in objects}
    account = {"kind": "ServiceAccount", "name": get_pod(scenario)["spec"]["serviceAccountName"], "namespace": "sail"}
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
        ("default", {"": RUN_RIGHTS, "sail": lease_rights("train-sailvl-operator")}),
        (
            "namespaced",
            {"team-a": RUN_RIGHTS, "team-b": RUN_RIGHTS, "sail": lease_rights("train-sailvl-operator")},
        ),
        ("everything", {"team-a": RUN_RIGHTS, "sail": lease_rights("sail-trainer")}),
        ("given-rights", {}),
    ],
)
def test_rights(scenario: str, expected: dict[str, Any]) -> None:
    assert rights_by_namespace(scenario) == expected


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_service_account(scenario: str) -> None:
    accounts = [o["metadata"]["name"] for o in render(scenario) if o["kind"] == "ServiceAccount"]
    assert get_pod(scenario)["spec"]["serviceAccountName"] in (accounts or ["given"])


BAD_VALUES = [
    pytest.param("replica=2", "additional properties 'replica' not allowed", id="an unknown name"),
    pytest.param("image.repo=x", "additional properties 'repo' not allowed", id="an unknown name below"),
    pytest.param("image.tag=a/b", "/image/tag", id="a tag with a slash"),
    pytest.param("image.repository=", "/image/repository", id="no repository"),
    pytest.param("image.digest=sha256:12", "/image/digest", id="half a digest"),
    pytest.param("image.pullPolicy=Sometimes", "/image/pullPolicy", id="a pull policy"),
    pytest.param("replicas=-1", "/replicas", id="fewer than no replicas"),
    pytest.param("replicas=two", "/replicas", id="replicas in words"),
    pytest.param("watchNamespaces={team-a,team-a}", "/watchNamespaces", id="a namespace twice"),
    pytest.param("watchNamespaces={Team}", "/watchNamespaces/0", id="a namespace in capitals"),
    pytest.param("runs.graceSeconds=0", "/runs/graceSeconds", id="no grace"),
    pytest.param("operator.logLevel=LOUD", "/operator/logLevel", id="a log level"),
    pytest.param("operator.events=maybe", "/operator/events", id="events in words"),
    pytest.param("resources.limits.memory=lots", "/resources/limits/memory", id="a quantity in words"),
    pytest.param(
        "podLabels.app\\.kubernetes\\.io/managed-by=sailvl-operator", "invalid propertyName", id="the workers' mark"
    ),
    pytest.param("metrics.podMonitor.interval=often", "/metrics/podMonitor/interval", id="an interval in words"),
    pytest.param("metrics.prometheusRule.enabled=true", "/metrics/serviceMonitor/enabled", id="alerts without series"),
    pytest.param("leaderElection.renewDeadlineSeconds=15", "set it below durationSeconds, 15", id="two leaders"),
]


@pytest.mark.parametrize(("value", "words"), BAD_VALUES)
def test_bad_values(value: str, words: str) -> None:
    done = run_helm("template", "train", str(CHART), "--kube-version", KUBERNETES, "--set", value)
    assert done.returncode != 0
    assert words in done.stderr


def test_an_old_cluster_is_refused() -> None:
    done = run_helm("template", "train", str(CHART), "--kube-version", "1.32.0")
    assert "chart requires kubeVersion" in done.stderr


def list_names(schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """Every value that a schema knows."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    for name, below in schema.get("properties", {}).items() if schema.get("type") == "object" else ():
        yield f"{path}{name}"
        yield from list_names(below, root, f"{path}{name}.")


def test_values_and_schema_name_the_same() -> None:
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


# Series and selectors


def is_selected(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_find_the_operator_alone(scenario: str) -> None:
    objects, pod = render(scenario), get_pod(scenario)["metadata"]["labels"]
    selectors = [o["spec"]["selector"] for o in objects if o["kind"] in ("Deployment", "PodDisruptionBudget")]
    services = [o["spec"]["selector"] for o in objects if o["kind"] == "Service"]
    for selector in [s["matchLabels"] for s in selectors] + services:
        assert is_selected(selector, pod)
        assert not is_selected(selector, build_attempt_labels("demo", "curate", 1))
    assert pod[names.LABEL_MANAGED_BY] != names.FIELD_MANAGER, "the operator would take itself for a worker"


def test_the_service_monitor_finds_the_service() -> None:
    objects = render("monitored")
    monitor, service = find(objects, "ServiceMonitor"), find(objects, "Service")
    assert is_selected(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint == {"port": service["spec"]["ports"][0]["name"], "path": "/metrics", "interval": "15s"} | {
        "honorLabels": True
    }
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_pod_monitor_finds_workers_everywhere() -> None:
    monitor = find(render("monitored"), "PodMonitor")["spec"]
    worker = build_service(namespace="team", run=build_run().name, owner_uid="uid")["spec"]
    assert monitor["selector"]["matchLabels"] == {names.LABEL_MANAGED_BY: names.FIELD_MANAGER}
    assert is_selected(monitor["selector"]["matchLabels"], worker["selector"])
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint == {"port": names.METRICS_PORT_NAME, "path": "/metrics", "interval": "5s", "honorLabels": True}
    assert monitor["namespaceSelector"] == {"any": True}


TARGET_LABELS = {"namespace", "job", "pod"}
"""What Prometheus adds to every series."""


def describe_series() -> dict[str, set[str]]:
    """Labels by name of every series that the operator and its workers serve."""
    registry = CollectorRegistry()
    metrics = [*vars(Metrics(registry)).values(), *vars(trainer := TrainerMetrics(registry)).values()]
    metrics += trainer.values.values()
    by_name = {m._name: set(m._labelnames) for m in metrics if hasattr(m, "_labelnames")}
    registry.register(OperatorCollector(queue=lambda: (0, 0.0), watches=lambda: [("jobs", 1.0)], is_leading=bool))
    time = "2026-01-01T00:00:00Z"
    stage = StageStatus(
        name="curate",
        state="Running",
        restarts={"Crash": 1},
        start_time=time,
        completion_time=time,
        progress=StageProgress(),
        metrics={"loss": "1"},
    )
    status = Status(stages=(stage,), goodput=Goodput(seconds={"training": 1}, gpu_seconds={"training": 1}))
    registry.register(RunCollector(lambda: [("team", "demo", status)]))
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return {
        family.name + suffix: by_name.get(family.name, set()) | {n for s in family.samples for n in s.labels}
        for family in registry.collect()
        for suffix in suffixes[family.type]
    }


def list_queries() -> Iterator[tuple[str, str]]:
    """Title and PromQL of every panel and alert."""
    objects = render("monitored")
    dashboard = json.loads(find(objects, "ConfigMap")["data"]["sailvl.json"])
    for panel in dashboard["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    for group in find(objects, "PrometheusRule")["spec"]["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])


def test_every_query_is_of_series_that_exist() -> None:
    series = describe_series()
    for title, query in list_queries():
        used = re.findall(r"\b(sailvl_\w+)(?:\{([^}]*)\})?", query)
        assert used, title
        for name, selector in used:
            assert name in series, f"{title}: {name}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= series[name] | TARGET_LABELS, f"{title}: {name}{{{selector}}}"
        kept = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", query) for label in by.split(",")}
        assert kept <= set().union(*(series[name] for name, _ in used)) | TARGET_LABELS | {"le"}, f"{title}: by {kept}"


def test_legends_and_words_use_labels_that_the_query_keeps() -> None:
    objects = render("monitored")
    dashboard = json.loads(find(objects, "ConfigMap")["data"]["sailvl.json"])
    told = [(t["expr"], t["legendFormat"], r"\{\{(\w+)\}\}") for p in dashboard["panels"] for t in p.get("targets", ())]
    for group in find(objects, "PrometheusRule")["spec"]["groups"]:
        told += [(r["expr"], " ".join(r["annotations"].values()), r"\$labels\.(\w+)") for r in group["rules"]]
    for query, words, pattern in told:
        kept = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", query) for label in by.split(",")}
        assert set(re.findall(pattern, words)) <= kept, query


PANELS = [
    *("Runs by state", "Stage progress", "Loss", "Held-out loss", "Learning rate", "Tokens a second"),
    *("Activity share", "Pack fill", "Restarts by cause", "Score by benchmark"),
    *("Reconcile latency", "Queue depth", "Watch age", "API calls"),
]


def test_the_dashboard_is_whole() -> None:
    config = find(render("monitored"), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"] == {"grafana_folder": "Training"}
    panels = json.loads(config["data"]["sailvl.json"])["panels"]
    assert set(PANELS) <= {panel["title"] for panel in panels}
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = Tally(
        (column, line)
        for g in (panel["gridPos"] for panel in panels)
        for column in range(g["x"], g["x"] + g["w"])
        for line in range(g["y"], g["y"] + g["h"])
    )
    assert max(taken.values()) == 1, "panels lie on each other"
    assert max(column for column, _ in taken) == 23


def test_alerts_are_whole_and_of_this_release() -> None:
    rules = [r for g in find(render("monitored"), "PrometheusRule")["spec"]["groups"] for r in g["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for name, selector in re.findall(r"(sailvl_operator_\w+)(\{[^}]*\})?", rule["expr"]):
            assert 'namespace="sail",job="train-sailvl-operator"' in selector, name
    assert "<operator>" not in render_text("monitored")
