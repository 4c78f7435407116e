"""Reads of the API server for the fault tests: plain JSON several times a second, and the table that kubectl prints."""

from __future__ import annotations

import json
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

RUNS = "/apis/sailvl.dev/v1alpha1/namespaces/{namespace}/sailvlruns/{name}"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


class ClusterReader:
    """Reads objects only; the tests write through kubectl, as users do."""

    ERRORS = (ApiException, HTTPError)
    """Raised while the API server is busy or not reachable."""

    def __init__(self, kubeconfig: str, namespace: str) -> None:
        self._client: client.ApiClient = config.new_client_from_config(kubeconfig)
        self._namespace = namespace

    def get_run(self, name: str) -> dict[str, Any]:
        """Return a SailVLRun as it is stored."""
        return self._get(RUNS.format(namespace=self._namespace, name=name))

    def get_printed_row(self, name: str) -> dict[str, str]:
        """Return the row that `kubectl get svr NAME` prints: effect by column."""
        table = self._get(RUNS.format(namespace=self._namespace, name=name), accept=TABLE)
        shown = [(i, c["name"].upper()) for i, c in enumerate(table["columnDefinitions"]) if not c["priority"]]
        cells = table["rows"][0]["cells"]
        return {column: "" if cells[i] is None else str(cells[i]) for i, column in shown}

    def list_pods(self, selector: str = "") -> list[dict[str, Any]]:
        """Return the pods of the run's namespace."""
        query = f"?labelSelector={selector}" if selector else ""
        found: list[dict[str, Any]] = self._get(f"/api/v1/namespaces/{self._namespace}/pods{query}")["items"]
        return found

    def list_pods_in(self, namespace: str) -> list[dict[str, Any]]:
        """Return the pods of another namespace."""
        found: list[dict[str, Any]] = self._get(f"/api/v1/namespaces/{namespace}/pods")["items"]
        return found

    def get_free_cpu_millis(self, node: str) -> int:
        """Return the millicores of a node that no pod requests."""
        allocatable = parse_cpu(self._get(f"/api/v1/nodes/{node}")["status"]["allocatable"]["cpu"])
        pods = self._get(f"/api/v1/pods?fieldSelector=spec.nodeName%3D{node}")["items"]
        active = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        containers = [container for pod in active for container in pod["spec"]["containers"]]
        return allocatable - sum(
            parse_cpu(c.get("resources", {}).get("requests", {}).get("cpu", "0")) for c in containers
        )

    def _get(self, path: str, accept: str = "application/json") -> dict[str, Any]:
        answer = self._client.call_api(
            path, "GET", header_params={"Accept": accept}, auth_settings=["BearerToken"], _preload_content=False,
            _request_timeout=10,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(answer.data)
        return found


def parse_cpu(quantity: str) -> int:
    """Return a CPU quantity in millicores."""
    return int(quantity[:-1]) if quantity.endswith("m") else int(float(quantity) * 1000)
