"""A synchronous client of a real API server for tests: objects are dicts, and each caller names its field manager."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import requests

from sailvl_operator.cluster.credentials import load_credentials
from sailvl_operator.cluster.resources import Resource

Object = dict[str, Any]

CLAIMS = Resource(api_version="v1", plural="persistentvolumeclaims")
QUOTAS = Resource(api_version="v1", plural="resourcequotas")
NAMESPACES, NODES, VOLUMES = (
    Resource(api_version="v1", plural=plural) for plural in ("namespaces", "nodes", "persistentvolumes")
)
"""These three and the resources below have no namespace."""
DEFINITIONS = Resource(api_version="apiextensions.k8s.io/v1", plural="customresourcedefinitions")
PRIORITIES = Resource(api_version="scheduling.k8s.io/v1", plural="priorityclasses")
POLICIES, BINDINGS, WEBHOOKS = (
    Resource(api_version="admissionregistration.k8s.io/v1", plural=plural)
    for plural in (
        "validatingadmissionpolicies",
        "validatingadmissionpolicybindings",
        "validatingwebhookconfigurations",
    )
)

_MAX_TRIES = 40
"""Tries of a request that is throttled, for example right after a new definition."""


class ApiStatusError(Exception):
    """The API server answered with an HTTP status of 400 or more."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def wait_until(
    condition: Callable[[], Any], seconds: float = 120.0, *, describe: Callable[[], Any] = lambda: ""
) -> Any:
    """Wait until a condition returns something true, and return it; `describe` adds to the message of a timeout."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {describe()}"
        time.sleep(0.25)
    return found


class ClusterApi:
    """One connection pool, for one thread. Use as a context manager."""

    def __init__(self, kubeconfig: str, manager: str = "test") -> None:
        credentials = load_credentials(kubeconfig, "")
        configuration = credentials.configuration
        self._server, self._manager = credentials.server, manager
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = configuration.ssl_ca_cert or configuration.verify_ssl
        if configuration.cert_file:
            self._session.cert = (configuration.cert_file, configuration.key_file)
        self._session.headers.update(asyncio.run(credentials.headers()))

    def __enter__(self) -> ClusterApi:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def get(self, resource: Resource, name: str, namespace: str = "") -> Object | None:
        """Return an object, or None if it does not exist."""
        try:
            return self._call("GET", resource.path(namespace, name))
        except ApiStatusError as error:
            if error.code != 404:
                raise
            return None

    def list(self, resource: Resource, namespace: str = "", selector: str = "", fields: str = "") -> list[Object]:
        """Return the objects that match a label and a field selector."""
        wanted = {"labelSelector": selector, "fieldSelector": fields}
        return self._call("GET", resource.path(namespace), wanted)["items"]

    def create(self, resource: Resource, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object in the namespace of its metadata."""
        parameters = {"fieldManager": self._manager} | ({"dryRun": "All"} if dry_run else {})
        return self._call("POST", resource.path(body["metadata"].get("namespace", "")), parameters, body)

    def patch(self, resource: Resource, name: str, body: Object, namespace: str = "", subresource: str = "") -> Object:
        """Apply a JSON merge patch."""
        path = resource.path(namespace, name, subresource)
        return self._call("PATCH", path, {"fieldManager": self._manager}, body, "application/merge-patch+json")

    def delete(self, resource: Resource, name: str, namespace: str = "") -> None:
        """Delete an object and, in the background, its dependents; it may be gone already."""
        try:
            self._call("DELETE", resource.path(namespace, name), {"propagationPolicy": "Background"})
        except ApiStatusError as error:
            if error.code != 404:
                raise

    def _call(
        self,
        method: str,
        path: str,
        parameters: dict[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        data, headers = None if body is None else json.dumps(body), {"Content-Type": content_type}
        for _ in range(_MAX_TRIES):
            answer = self._session.request(
                method, self._server + path, params=parameters, data=data, headers=headers, timeout=30
            )
            if answer.status_code != 429:
                break
            time.sleep(0.5)
        if answer.status_code >= 400:
            is_status = answer.headers.get("Content-Type") == "application/json"
            raise ApiStatusError(answer.status_code, answer.json()["message"] if is_status else answer.text)
        return answer.json()


def build_object(kind: str, name: str, api_version: str = "v1", **fields: Any) -> Object:
    """Return an object; `namespace` and `labels` become metadata, all other fields are top-level."""
    metadata = {"name": name} | {key: fields.pop(key) for key in ("namespace", "labels") if key in fields}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata} | fields
