"""Resources that the operator uses, and their paths on the API server."""

from __future__ import annotations

from dataclasses import dataclass

from sailvl_operator.api import names


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """A namespaced resource.

    `api_version`: group and version, as in manifests; `plural`: its name in URLs.
    """

    api_version: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the path of a collection, or of an object if it is named; without a namespace, of all namespaces."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        tail = "".join(f"/{part}" for part in (self.plural, name, subresource) if part)
        return root + scope + tail


RUNS = Resource(api_version=names.API_VERSION, plural=names.PLURAL)
JOBS = Resource(api_version="batch/v1", plural="jobs")
PODS = Resource(api_version="v1", plural="pods")
SERVICES = Resource(api_version="v1", plural="services")
CLAIMS = Resource(api_version="v1", plural="persistentvolumeclaims")
EVENTS = Resource(api_version="v1", plural="events")
LEASES = Resource(api_version="coordination.k8s.io/v1", plural="leases")
WORKLOADS = tuple(
    Resource(api_version=f"kueue.x-k8s.io/{version}", plural="workloads") for version in ("v1beta2", "v1beta1")
)
"""Kueue's Workloads, one per queued Job, newest version first. They only exist if Kueue is installed."""
