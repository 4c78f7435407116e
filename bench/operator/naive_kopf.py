"""The baseline: an operator for the same resource, written as kopf's tutorial teaches, with the official client.

A handler creates the Job of a new run; events of Jobs and pods update its status. It restarts nothing.
"""

from __future__ import annotations

from typing import Any

import kopf
import kubernetes

kubernetes.config.load_kube_config()
BATCH = kubernetes.client.BatchV1Api()
OBJECTS = kubernetes.client.CustomObjectsApi()
CORE = kubernetes.client.CoreV1Api()
RUN = "sailvl.dev/run"


@kopf.on.create("sailvl.dev", "v1alpha1", "sailvlruns")
def create(name: str, namespace: str | None, spec: kopf.Spec, **_: Any) -> None:
    nodes = spec["workers"]["nodes"]
    labels = {RUN: name}
    container = {"name": "worker", "image": spec["image"], "command": ["python", "-m", "sailvl_trainer"]}
    pod = {"restartPolicy": "Never", "subdomain": name, "containers": [container]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    job = {
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimitPerIndex": 0,
            "template": template,
        },
    }
    service = {"metadata": {"name": name, "labels": labels}, "spec": {"clusterIP": "None", "selector": labels}}
    kopf.adopt(job)
    kopf.adopt(service)
    CORE.create_namespaced_service(namespace, service)
    BATCH.create_namespaced_job(namespace, job)


@kopf.on.event("batch", "v1", "jobs", labels={RUN: kopf.PRESENT})
def see_job(namespace: str | None, labels: kopf.Labels, status: kopf.Status, **_: Any) -> None:
    patch(namespace, labels[RUN], {"summary": {"ready": f"{status.get('ready', 0)}/{status.get('active', 0)}"}})


@kopf.on.event("", "v1", "pods", labels={RUN: kopf.PRESENT})
def see_pod(namespace: str | None, labels: kopf.Labels, status: kopf.Status, **_: Any) -> None:
    if status.get("phase") == "Running":
        patch(namespace, labels[RUN], {"summary": {"reason": "Running"}})


def patch(namespace: str | None, name: str, status: dict[str, Any]) -> None:
    OBJECTS.patch_namespaced_custom_object_status(
        "sailvl.dev", "v1alpha1", namespace, "sailvlruns", name, {"status": status}
    )
