"""Selectors, monitors, dashboard and alerts of the chart match the labels and series of operator and workers."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric

from sailvl_operator.api import names
from sailvl_operator.api.status import Goodput, StageProgress, StageStatus, Status
from sailvl_operator.core.desired.manifests import build_attempt_labels, build_service
from sailvl_operator.metrics import LOOPS, Metrics, OperatorCollector
from sailvl_operator.run_series import RunCollector
from sailvl_trainer.curate.report import OUTCOME_LABELS
from sailvl_trainer.rank.metrics import TrainerMetrics
from tests.support.builders.operator import build_run
from tests.support.chart import SCENARIOS, find_helm, find_object, get_pod_template, render, render_text
from tests.support.live.prometheus import find_promtool

pytestmark = pytest.mark.skipif(
    find_helm() is None, reason="helm is neither in PATH nor built (`make cluster` builds it)"
)

TRAINER = Path(__file__).parents[4] / "trainer/sailvl_trainer"


def is_selected(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_match_only_the_operator(scenario: str) -> None:
    objects, pod = render(scenario), get_pod_template(scenario)["metadata"]["labels"]
    selectors = [o["spec"]["selector"] for o in objects if o["kind"] in ("Deployment", "PodDisruptionBudget")]
    services = [o["spec"]["selector"] for o in objects if o["kind"] == "Service"]
    for selector in [s["matchLabels"] for s in selectors] + services:
        assert is_selected(selector, pod)
        assert not is_selected(selector, build_attempt_labels("demo", "curate", 1))
    assert pod[names.LABEL_MANAGED_BY] != names.FIELD_MANAGER, "the operator would match its own selector for workers"


def test_service_monitor_matches_the_service() -> None:
    objects = render("monitored")
    monitor, service = find_object(objects, "ServiceMonitor"), find_object(objects, "Service")
    assert is_selected(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint == {"port": service["spec"]["ports"][0]["name"], "path": "/metrics", "interval": "15s"} | {
        "honorLabels": True
    }
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_pod_monitor_matches_workers_in_all_namespaces() -> None:
    monitor = find_object(render("monitored"), "PodMonitor")["spec"]
    worker = build_service(namespace="team", run=build_run().name, owner_uid="uid")["spec"]
    assert monitor["selector"]["matchLabels"] == {names.LABEL_MANAGED_BY: names.FIELD_MANAGER}
    assert is_selected(monitor["selector"]["matchLabels"], worker["selector"])
    [endpoint] = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["interval"]) == (names.METRICS_PORT_NAME, "/metrics", "5s")
    assert monitor["namespaceSelector"] == {"any": True}


def get_worker_endpoint() -> dict[str, Any]:
    [endpoint] = find_object(render("monitored"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    return endpoint


IN_OPERATOR = {"sailvl_score", "sailvl_result"}
"""Metrics whose names a worker can choose; those of the operator have them as well, limited."""
ACTIVITIES = re.compile(r'(?:telemetry\.activity|pool\.run|pool\.run_on_first_rank|self\._activity)\(\s*"(\w+)"')
OUTCOMES = re.compile(r'count_samples\("(\w+)"')


def list_label_values() -> dict[str, set[str]]:
    """Return the values of the labels of the trainer's series, which its sources name."""
    sources = [path.read_text() for path in TRAINER.rglob("*.py")]
    activities, outcomes = ({name for s in sources for name in p.findall(s)} for p in (ACTIVITIES, OUTCOMES))
    return {
        "activity": activities | {"starting"},
        "kind": {"resident", "accelerator_peak"},
        "outcome": outcomes | set(OUTCOME_LABELS),
    }


def test_pod_monitor_takes_every_series_of_the_trainer() -> None:
    keep, label_keep = get_worker_endpoint()["metricRelabelings"]
    assert keep["sourceLabels"] == ["__name__", "activity", "kind", "outcome"]
    values = list_label_values()
    for family in collect_trainer_metrics():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = describe_series()[name] - {"run", "stage"}
        if name in IN_OPERATOR:
            continue
        for value in values[labels.pop()] if labels else [""]:
            series = ";".join([name, *(value if value in values[label] else "" for label in values)])
            assert re.fullmatch(keep["regex"], series), f"{series}: add the value to templates/podmonitor.yaml"
        assert all(re.fullmatch(label_keep["regex"], label) for label in describe_series()[name])


@pytest.mark.parametrize(
    "series",
    [
        "sailvl_operator_leading;;;",
        "sailvl_runs;;;",
        "sailvl_score;;;",
        "sailvl_loss;training;;",
        "sailvl_loss;;;trained",
        "sailvl_activity_seconds_total;;;",
        "sailvl_activity_seconds_total;a7f3;;",
        "sailvl_activity_seconds_total;training;resident;",
        "sailvl_samples_total;;;trained2",
    ],
)
def test_pod_monitor_takes_no_other_series(series: str) -> None:
    keep, _ = get_worker_endpoint()["metricRelabelings"]
    assert not re.fullmatch(keep["regex"], series)


def test_pod_monitor_labels_the_series_as_the_pod_is_labelled() -> None:
    monitor, endpoint = find_object(render("monitored"), "PodMonitor")["spec"], get_worker_endpoint()
    found = {rule["targetLabel"]: rule["sourceLabels"] for rule in endpoint["relabelings"]}
    sources = {"run": names.LABEL_RUN, "stage": names.LABEL_STAGE}
    prefix = "__meta_kubernetes_pod_label_"
    assert found == {label: [prefix + re.sub(r"\W", "_", source)] for label, source in sources.items()}
    assert endpoint["honorLabels"] is False
    _, label_keep = endpoint["metricRelabelings"]
    assert label_keep["action"] == "labelkeep"
    labels = label_keep["regex"].split("|")
    assert {"__name__", *TARGET_LABELS, "run", "stage"} < set(labels)
    assert not any(re.fullmatch(label_keep["regex"], name) for name in ("exported_run", "benchmark", "metric", "x"))
    assert len(labels) <= monitor["labelLimit"]
    assert max(map(len, labels)) <= monitor["labelNameLengthLimit"]
    assert monitor["labelValueLengthLimit"] >= 63 + 1 + 253, "namespace/name of the PodMonitor is the job"
    assert monitor["sampleLimit"] >= 2 * (20 + sum(map(len, list_label_values().values())))


def collect_trainer_metrics() -> list[Metric]:
    """Return the families of all metrics of the trainer."""
    registry = CollectorRegistry()
    TrainerMetrics(registry)
    return list(registry.collect())


TARGET_LABELS = {"namespace", "job", "pod"}
"""Labels that Prometheus adds to every series."""


def describe_series() -> dict[str, set[str]]:
    """Return the labels of every series of operator and workers by the name of the series."""
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
    registry.register(RunCollector(lambda: [("team", "demo", lambda: status)]))
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return {
        family.name + suffix: by_name.get(family.name, set()) | {n for s in family.samples for n in s.labels}
        for family in registry.collect()
        for suffix in suffixes[family.type]
    }


def list_queries() -> Iterator[tuple[str, str]]:
    """Yield the title and the PromQL expression of every panel and alert."""
    objects = render("monitored")
    dashboard = json.loads(find_object(objects, "ConfigMap")["data"]["sailvl.json"])
    for panel in dashboard["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    for group in find_object(objects, "PrometheusRule")["spec"]["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])


def test_every_query_uses_existing_series_and_labels() -> None:
    series = describe_series()
    for title, query in list_queries():
        used = re.findall(r"\b(sailvl_\w+)(?:\{([^}]*)\})?", query)
        assert used, title
        for name, selector in used:
            assert name in series, f"{title}: {name}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= series[name] | TARGET_LABELS, f"{title}: {name}{{{selector}}}"
        grouping = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", query) for label in by.split(",")}
        assert grouping <= set().union(*(series[name] for name, _ in used)) | TARGET_LABELS | {"le"}, (
            f"{title}: by {grouping}"
        )


def test_legends_and_annotations_use_labels_of_the_query() -> None:
    objects = render("monitored")
    dashboard = json.loads(find_object(objects, "ConfigMap")["data"]["sailvl.json"])
    texts = [
        (t["expr"], t["legendFormat"], r"\{\{(\w+)\}\}") for p in dashboard["panels"] for t in p.get("targets", ())
    ]
    for group in find_object(objects, "PrometheusRule")["spec"]["groups"]:
        texts += [(r["expr"], " ".join(r["annotations"].values()), r"\$labels\.(\w+)") for r in group["rules"]]
    for query, text, pattern in texts:
        grouping = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", query) for label in by.split(",")}
        assert set(re.findall(pattern, text)) <= grouping, query


PANELS = [
    *("Runs by state", "Stage progress", "Loss", "Held-out loss", "Learning rate", "Tokens per second"),
    *("Time by activity", "Pack fill", "Restarts by cause", "Score by benchmark"),
    *("Reconcile latency", "Queue depth", "Watch age", "API calls"),
]


def test_dashboard_has_all_panels_without_overlap() -> None:
    config = find_object(render("monitored"), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"] == {"grafana_folder": "Training"}
    panels = json.loads(config["data"]["sailvl.json"])["panels"]
    assert set(PANELS) <= {panel["title"] for panel in panels}
    assert len({panel["id"] for panel in panels}) == len(panels)
    occupied = Tally(
        (column, line)
        for g in (panel["gridPos"] for panel in panels)
        for column in range(g["x"], g["x"] + g["w"])
        for line in range(g["y"], g["y"] + g["h"])
    )
    assert max(occupied.values()) == 1, "panels overlap"
    assert max(column for column, _ in occupied) == 23


@pytest.mark.skipif(find_promtool() is None, reason="promtool is neither in PATH nor built (`make cluster` builds it)")
@pytest.mark.parametrize(
    ("values", "alerting_loops"),
    [("0x10 1x50", ["progress"]), ("7x60", []), ("0x60", [])],
    ids=["first error", "errors of long ago", "no error"],
)
def test_loop_error_raises_an_alert(tmp_path: Path, values: str, alerting_loops: list[str]) -> None:
    rules = find_object(render("monitored"), "PrometheusRule")["spec"]
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        del rule["annotations"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    labels = 'namespace="sail",job="train-sailvl-operator",pod="p",loop="progress"'
    expected = [{"exp_labels": {"severity": "warning", "pod": "p", "loop": loop}} for loop in alerting_loops]
    case = {
        "interval": "15s",
        "input_series": [{"series": f"sailvl_operator_loop_errors_total{{{labels}}}", "values": values}],
        "alert_rule_test": [{"alertname": "SailVLOperatorLoopErrors", "eval_time": "5m", "exp_alerts": expected}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [case]}))
    tested = [str(find_promtool()), "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(tested, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_loop_has_a_series_from_before_its_first_error() -> None:
    """Prometheus sees no increase in a series that begins with the first error."""
    Metrics(registry := CollectorRegistry())
    values = {loop: registry.get_sample_value("sailvl_operator_loop_errors_total", {"loop": loop}) for loop in LOOPS}
    assert values == dict.fromkeys(LOOPS, 0.0)


def test_alerts_are_complete_and_select_this_release() -> None:
    rules = [r for g in find_object(render("monitored"), "PrometheusRule")["spec"]["groups"] for r in g["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for name, selector in re.findall(r"(sailvl_operator_\w+)(\{[^}]*\})?", rule["expr"]):
            assert 'namespace="sail",job="train-sailvl-operator"' in selector, name
    assert "<operator>" not in render_text("monitored")
