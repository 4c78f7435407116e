"""What can stand in the way of a run on a real cluster, each with the words of who holds it back and with the way out;
used by the tests of the Stuck condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sailvl_operator.cluster.resources import JOBS, PODS, SERVICES, Resource
from tests.support.live.api import (
    BINDINGS,
    CLAIMS,
    NODES,
    POLICIES,
    QUOTAS,
    WEBHOOKS,
    Object,
    Refused,
    build_object,
    until,
)
from tests.support.live.stub_runs import RUN_LABEL, Place, Run, build_stage

Act = Callable[[Place, Run], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """What stands in the way of the run of the same name."""

    name: str
    reason: str
    words: str
    """Part of the condition's message."""
    spec: Object = field(default_factory=dict)
    """Of the run."""
    stub: str = "succeed"
    nodes: int = 1
    put: Callable[[Place, str], None] = lambda place, name: None
    """Before the run of this name is created."""
    mend: Act
    """Afterwards; the run goes on by itself."""
    room: str = "common"
    """The namespace: some obstacles stand in everybody's way."""
    attempts: int = 1
    """With which it ends."""


def no_quota(**hard: str) -> Callable[[Place, str], None]:
    def put(place: Place, name: str) -> None:
        body = build_object("ResourceQuota", "none", namespace=place.namespace, spec={"hard": hard})
        place.api.create(QUOTAS, body)
        until(lambda: place.api.get(QUOTAS, "none", place.namespace)["status"].get("hard"))

    return put


def deny(resource: str, group: str) -> Callable[[Place, str], None]:
    """An admission policy that lets no such object of the run pass."""

    def put(place: Place, name: str) -> None:
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
        of_run = {"objectSelector": {"matchLabels": {RUN_LABEL: name}}}
        policy = {
            "matchConstraints": {"resourceRules": [rule]} | of_run,
            "validations": [{"expression": "false", "message": f"no {resource} on Fridays"}],
        }
        here = {"matchLabels": {"kubernetes.io/metadata.name": place.namespace}}
        own = unique(place, name)
        kind = "ValidatingAdmissionPolicy"
        place.api.create(POLICIES, build_object(kind, own, ADMISSION, spec=policy))
        binding = {"policyName": own, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": here}}
        place.api.create(BINDINGS, build_object(f"{kind}Binding", own, ADMISSION, spec=binding))

    return put


def allow(place: Place, name: str) -> None:
    for resource in (BINDINGS, POLICIES, WEBHOOKS):
        place.api.delete(resource, unique(place, name))


def break_webhook(resource: str, group: str) -> Callable[[Place, str], None]:
    """A webhook that has a say and gives no answer."""

    def put(place: Place, name: str) -> None:
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
        hook = {
            "name": "policy.example.com",
            "rules": [rule],
            "clientConfig": {"url": "https://127.0.0.1:1/validate"},
            "objectSelector": {"matchLabels": {RUN_LABEL: name}},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.namespace}},
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "timeoutSeconds": 2,
        }
        body = build_object("ValidatingWebhookConfiguration", unique(place, name), ADMISSION, webhooks=[hook])
        place.api.create(WEBHOOKS, body)

    return put


ADMISSION = "admissionregistration.k8s.io/v1"


def unique(place: Place, name: str) -> str:
    """For objects without a namespace."""
    return f"{place.namespace}-{name}"


def take_name(
    resource: Resource, kind: str, api_version: str, suffix: str, **spec: Any
) -> Callable[[Place, str], None]:
    def put(place: Place, name: str) -> None:
        body = build_object(kind, name + suffix, api_version, namespace=place.namespace, spec=spec)
        place.api.create(resource, body)

    return put


def give_name_back(resource: Resource, suffix: str) -> Act:
    return lambda place, run: place.api.delete(resource, run.name + suffix, place.namespace)


def edit(**spec: Any) -> Act:
    """Changed settings are the next attempt's, which a person asks for."""

    def mend(place: Place, run: Run) -> None:
        run.edit(**spec)
        run.ask("draw-a")

    return mend


def label_node(place: Place, run: Run) -> None:
    node = place.api.list(NODES)[0]["metadata"]["name"]
    place.api.patch(NODES, node, {"metadata": {"labels": {place.namespace: "wanted"}}})


def add_claim_and_volume(place: Place, run: Run) -> None:
    place.add_volume(unique(place, run.name), run.name)
    place.add_claim(run.name, unique(place, run.name))


def add_broken_volume(place: Place, name: str) -> None:
    place.add_volume(unique(place, name), name, path=str(place.storage / "absent"), type="Directory")
    place.add_claim(name, unique(place, name))


def make_folder(place: Place, run: Run) -> None:
    folder = place.storage / "absent"
    folder.mkdir()
    folder.chmod(0o777)


STRANGER = {
    "restartPolicy": "Never",
    "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "image": "none",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
}
"""A pod of no run that the Pod Security Standard allows."""
OBSTACLES = [
    Obstacle(
        name="cpu",
        reason="Unschedulable",
        words="nodes are available: 2 Insufficient cpu",
        spec={"workers": {"resources": {"requests": {"cpu": "1000"}}}},
        mend=edit(workers={"resources": None}),
        attempts=2,
    ),
    Obstacle(
        name="selector",
        reason="Unschedulable",
        words="didn't match Pod's node affinity/selector",
        spec={"workers": {"nodeSelector": {"$namespace": "wanted"}}},
        mend=label_node,
    ),
    Obstacle(
        name="pods-quota",
        reason="QuotaExceeded",
        words="exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0",
        put=no_quota(pods="0"),
        mend=lambda place, run: place.api.delete(QUOTAS, "none", place.namespace),
        room="pods",
    ),
    Obstacle(
        name="jobs-quota",
        reason="QuotaExceeded",
        words="exceeded quota: none, requested: count/jobs.batch=1, used: count/jobs.batch=0",
        put=no_quota(**{"count/jobs.batch": "0"}),
        mend=lambda place, run: place.api.delete(QUOTAS, "none", place.namespace),
        room="jobs",
    ),
    Obstacle(
        name="half-quota",
        reason="QuotaExceeded",
        words="failed quota: none: must specify limits.memory for: worker",
        put=no_quota(**{"limits.memory": "64Mi"}),
        mend=edit(workers={"resources": {"limits": {"memory": "32Mi"}}}),
        room="memory",
        attempts=2,
    ),
    Obstacle(
        name="scheduler",
        reason="Unschedulable",
        words="no-such-scheduler",
        spec={"workers": {"schedulerName": "no-such-scheduler"}},
        mend=edit(workers={"schedulerName": None}),
        attempts=2,
    ),
    Obstacle(
        name="image",
        reason="ImagePullFailed",
        words="no-such-worker:1",
        spec={"image": "localhost:5000/no-such-worker:1"},
        mend=lambda place, run: edit(image=place.image)(place, run),
        attempts=2,
    ),
    Obstacle(
        name="no-claim",
        reason="VolumeNotReady",
        words='persistentvolumeclaim "no-claim" not found',
        spec={"storage": {"volumeClaim": "no-claim"}},
        mend=add_claim_and_volume,
    ),
    Obstacle(
        name="unbound",
        reason="VolumeNotReady",
        words="unbound immediate PersistentVolumeClaims",
        spec={"storage": {"volumeClaim": "unbound"}},
        put=lambda place, name: place.add_claim(name),
        mend=lambda place, run: place.add_volume(unique(place, run.name), run.name),
    ),
    Obstacle(
        name="template",
        reason="VolumeNotReady",
        words="unbound immediate PersistentVolumeClaims",
        spec={
            "storage": {
                "volumeClaimTemplate": {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
            }
        },
        mend=lambda place, run: place.add_volume(unique(place, run.name), f"{run.name}-storage"),
    ),
    Obstacle(
        name="folder",
        reason="VolumeNotReady",
        words="FailedMount: MountVolume.SetUp failed for volume",
        spec={"storage": {"volumeClaim": "folder"}},
        put=add_broken_volume,
        mend=make_folder,
    ),
    Obstacle(
        name="no-pods",
        reason="AdmissionDenied",
        words="no pods on Fridays",
        put=deny("pods", ""),
        mend=lambda place, run: allow(place, run.name),
    ),
    Obstacle(
        name="no-jobs",
        reason="AdmissionDenied",
        words="no jobs on Fridays",
        put=deny("jobs", "batch"),
        mend=lambda place, run: allow(place, run.name),
    ),
    Obstacle(
        name="deaf-pods",
        reason="AdmissionDenied",
        words='failed calling webhook "policy.example.com"',
        put=break_webhook("pods", ""),
        mend=lambda place, run: allow(place, run.name),
    ),
    Obstacle(
        name="deaf-jobs",
        reason="AdmissionDenied",
        words='failed calling webhook "policy.example.com"',
        put=break_webhook("jobs", "batch"),
        mend=lambda place, run: allow(place, run.name),
    ),
    Obstacle(
        name="job",
        reason="NameConflict",
        words="Job job-draw-a-1 exists and isn't this run's; delete it or rename the run",
        put=take_name(JOBS, "Job", "batch/v1", "-draw-a-1", suspend=True, template={"spec": STRANGER}),
        mend=give_name_back(JOBS, "-draw-a-1"),
    ),
    Obstacle(
        name="service",
        reason="NameConflict",
        words="Service service exists and isn't this run's; delete it or rename the run",
        stub="meet",
        nodes=2,
        put=take_name(SERVICES, "Service", "v1", "", ports=[{"port": 80}]),
        mend=give_name_back(SERVICES, ""),
    ),
    Obstacle(
        name="claim",
        reason="NameConflict",
        words="PersistentVolumeClaim claim-storage exists and isn't this run's; delete it or rename the run",
        spec={
            "storage": {
                "volumeClaimTemplate": {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
            }
        },
        put=lambda place, name: place.add_claim(f"{name}-storage"),
        mend=lambda place, run: [
            place.api.delete(CLAIMS, f"{run.name}-storage", place.namespace),
            place.add_volume(unique(place, run.name), f"{run.name}-storage"),
        ],
    ),
    Obstacle(
        name="priority",
        reason="Forbidden",
        words="no PriorityClass with name no-such-priority was found",
        spec={"workers": {"priorityClassName": "no-such-priority"}},
        mend=edit(workers={"priorityClassName": None}),
        attempts=2,
    ),
    Obstacle(
        name="gate",
        reason="GateNotPassed",
        words="stage draw-a: score is 0.5; its gate wants at least 0.9; raise the gate",
        spec={"stages": [build_stage("draw-a", gate={"metric": "score", "atLeast": "0.9", "onFail": "Pause"})]},
        mend=lambda place, run: run.edit(
            stages=[build_stage("draw-a", gate={"metric": "score", "atLeast": "0.4", "onFail": "Pause"})]
        ),
    ),
]


def create(obstacle: Obstacle, place: Place) -> Run:
    spec = fill_in(obstacle.spec, place.namespace)
    return Run(place, obstacle.name, obstacle.stub, nodes=obstacle.nodes, **spec)


def clean(place: Place) -> None:
    """What has no namespace doesn't go with it."""
    for obstacle in OBSTACLES:
        allow(place, obstacle.name)
    for node in place.api.list(NODES, selector=place.namespace):
        place.api.patch(NODES, node["metadata"]["name"], {"metadata": {"labels": {place.namespace: None}}})


def fill_in(spec: Any, namespace: str) -> Any:
    if not isinstance(spec, dict):
        return spec
    return {name.replace("$namespace", namespace): fill_in(value, namespace) for name, value in spec.items()}


def is_denied(place: Place, run: str) -> bool:
    """Whether a policy or webhook is in force: it takes a moment."""
    labels = {RUN_LABEL: run}
    pod = build_object("Pod", "probe", namespace=place.namespace, labels=labels, spec=STRANGER)
    job = build_object("Job", "probe", "batch/v1", namespace=place.namespace, labels=labels)
    job["spec"] = {"suspend": True, "template": {"spec": STRANGER}}
    resource, body = (PODS, pod) if run.endswith("pods") else (JOBS, job)
    try:
        place.api.create(resource, body, dry=True)
    except Refused as error:
        return "webhook" in str(error) or "Fridays" in str(error)
    return False
