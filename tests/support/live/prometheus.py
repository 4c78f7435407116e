"""A real Prometheus that discovers its targets as the chart's PodMonitor and ServiceMonitor define."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Prometheus:
    """A running Prometheus server."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the vector of an expression."""
        arguments = {"query": expression} | ({} if at is None else {"time": str(at)})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode(arguments)}") as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the matrix of an expression between two Unix times in seconds."""
        arguments = {"query": expression, "start": start, "end": end, "step": step}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(arguments)}") as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


@contextmanager
def start_prometheus(
    folder: Path, kubeconfig: str, monitors: list[dict[str, Any]], namespaces: list[str]
) -> Iterator[Prometheus]:
    """Start Prometheus with the scrape configuration of some monitors; stop it at the end."""
    jobs = [build_scrape_config(monitor, kubeconfig, namespaces) for monitor in monitors]
    with run_prometheus(folder, jobs) as prometheus:
        yield prometheus


@contextmanager
def run_prometheus(folder: Path, jobs: list[dict[str, Any]], interval: str = "5s") -> Iterator[Prometheus]:
    """Start Prometheus with scrape configurations, in a folder that is emptied; stop it at the end."""
    binary = find_prometheus()
    if binary is None:
        pytest.skip(
            "prometheus is not installed: put one with discovery of Kubernetes on PATH (`make cluster` builds it)"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": interval}, "scrape_configs": jobs}))
    port = _free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/-/ready", folder / "log")
        yield Prometheus(url=f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def find_prometheus() -> str | None:
    """Return prometheus in PATH, else the newest that hack/cluster/build.sh has built."""
    return _find_binary("prometheus")


def find_promtool() -> str | None:
    """Return promtool in PATH, else the newest that hack/cluster/build.sh has built."""
    return _find_binary("promtool")


def _find_binary(name: str) -> str | None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = sorted(cache.glob(f"sailvl/bin/*/{name}"), key=lambda path: path.stat().st_mtime)
    return shutil.which(name) or (str(built[-1]) if built else None)


def render_monitors(chart: Path, release: str, system: str) -> list[dict[str, Any]]:
    """Return the chart's PodMonitor and ServiceMonitor."""
    values = ("metrics.podMonitor.enabled", "metrics.serviceMonitor.enabled")
    flags = [part for value in values for part in ("--set", f"{value}=true")]
    flags += ["--set", "networkPolicy.prometheus.namespace=monitoring"]
    command = ["helm", "template", release, str(chart), "-n", system, "--kube-version=1.34.0", *flags]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = ("PodMonitor", "ServiceMonitor")
    return [d for d in yaml.safe_load_all(rendered) if d and d["kind"] in kinds]


def build_scrape_config(monitor: dict[str, Any], kubeconfig: str, namespaces: list[str]) -> dict[str, Any]:
    """Return the scrape configuration that the Prometheus Operator generates from a monitor."""
    is_pod = monitor["kind"] == "PodMonitor"
    role, prefix = ("pod", "__meta_kubernetes_pod") if is_pod else ("endpoints", "__meta_kubernetes_service")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints" if is_pod else "endpoints"]
    port = "__meta_kubernetes_pod_container_port_name" if is_pod else "__meta_kubernetes_endpoint_port_name"
    selected = monitor["spec"]["selector"]["matchLabels"]
    keep = [_build_keep_rule(f"{prefix}_label_{_to_label_name(name)}", value) for name, value in selected.items()]
    return {
        "job_name": f"{monitor['kind']}/{monitor['metadata']['name']}",
        "metrics_path": endpoint.get("path", "/metrics"),
        "kubernetes_sd_configs": [{"role": role, "kubeconfig_file": kubeconfig, "namespaces": {"names": namespaces}}],
        "relabel_configs": [
            *keep,
            _build_keep_rule(port, endpoint["port"]),
            *_build_target_labels(monitor),
            *map(_to_snake_case, endpoint.get("relabelings", [])),
        ],
    } | build_limits(monitor)


def build_limits(monitor: dict[str, Any]) -> dict[str, Any]:
    """Return what a monitor allows its targets, as settings of a scrape configuration."""
    spec = monitor["spec"]
    (endpoint,) = spec["podMetricsEndpoints" if monitor["kind"] == "PodMonitor" else "endpoints"]
    return {
        "honor_labels": endpoint.get("honorLabels", False),
        "honor_timestamps": endpoint.get("honorTimestamps", True),
        "follow_redirects": endpoint.get("followRedirects", True),
        "sample_limit": spec.get("sampleLimit", 0),
        "body_size_limit": spec.get("bodySizeLimit", "0"),
        "label_limit": spec.get("labelLimit", 0),
        "label_name_length_limit": spec.get("labelNameLengthLimit", 0),
        "label_value_length_limit": spec.get("labelValueLengthLimit", 0),
        "metric_relabel_configs": [_to_snake_case(rule) for rule in endpoint.get("metricRelabelings", [])],
    }


def _build_target_labels(monitor: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rules that label a target; a ServiceMonitor's job is the Service, a PodMonitor's the monitor."""
    labels = {"namespace": "__meta_kubernetes_namespace", "pod": "__meta_kubernetes_pod_name"}
    if monitor["kind"] == "ServiceMonitor":
        labels["job"] = "__meta_kubernetes_service_name"
    return [{"source_labels": [source], "target_label": label} for label, source in labels.items()]


def _build_keep_rule(label: str, value: str) -> dict[str, Any]:
    return {"action": "keep", "source_labels": [label], "regex": value}


def _to_label_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _to_snake_case(rule: dict[str, Any]) -> dict[str, Any]:
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return {names.get(key, key): value for key, value in rule.items()}


def _wait_until_ready(url: str, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"prometheus is not ready: {log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
