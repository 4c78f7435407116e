"""Everything that can block the start of a run on a real cluster, with the expected Stuck condition and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sailvl_operator.cluster.resources import JOBS, NETWORK_POLICIES, PODS, SERVICES, Resource
from tests.support.live.api import (
    BINDINGS,
    CLAIMS,
    NODES,
    POLICIES,
    QUOTAS,
    WEBHOOKS,
    ApiStatusError,
    Object,
    build_object,
    wait_until,
)
from tests.support.live.stub_runs import RUN_LABEL, StubRun, Workspace, build_stage

RunAction = Callable[[Workspace, StubRun], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockedStart:
    """A cause that blocks the start of the run of the same name."""

    name: str
    reason: str
    message: str
    """Part of the condition's message."""
    spec: Object = field(default_factory=dict)
    """Fields of the run's spec."""
    stub: str = "succeed"
    nodes: int = 1
    block: Callable[[Workspace, str], None] = lambda workspace, name: None
    """Called with the run's name before the run is created."""
    unblock: RunAction
    """Called afterwards; the run then starts by itself."""
    workspace: str = "common"
    """The workspace of the run; some causes block every run of a namespace."""
    attempts: int = 1
    """The attempt that succeeds."""


def add_quota(**hard: str) -> Callable[[Workspace, str], None]:
    def put(workspace: Workspace, name: str) -> None:
        body = build_object("ResourceQuota", "none", namespace=workspace.namespace, spec={"hard": hard})
        workspace.api.create(QUOTAS, body)
        wait_until(lambda: workspace.api.get(QUOTAS, "none", workspace.namespace)["status"].get("hard"))

    return put


def deny_creation(resource: str, group: str) -> Callable[[Workspace, str], None]:
    """Return a function that adds an admission policy against a kind of the run's objects."""

    def put(workspace: Workspace, name: str) -> None:
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
        run_objects = {"objectSelector": {"matchLabels": {RUN_LABEL: name}}}
        policy = {
            "matchConstraints": {"resourceRules": [rule]} | run_objects,
            "validations": [{"expression": "false", "message": f"no {resource} on Fridays"}],
        }
        in_namespace = {"matchLabels": {"kubernetes.io/metadata.name": workspace.namespace}}
        policy_name = build_unique_name(workspace, name)
        kind = "ValidatingAdmissionPolicy"
        workspace.api.create(POLICIES, build_object(kind, policy_name, ADMISSION, spec=policy))
        binding = {
            "policyName": policy_name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": in_namespace},
        }
        workspace.api.create(BINDINGS, build_object(f"{kind}Binding", policy_name, ADMISSION, spec=binding))

    return put


def remove_admission(workspace: Workspace, name: str) -> None:
    """Remove the policies and webhooks against a run's objects."""
    for resource in (BINDINGS, POLICIES, WEBHOOKS):
        workspace.api.delete(resource, build_unique_name(workspace, name))


def break_webhook(resource: str, group: str) -> Callable[[Workspace, str], None]:
    """Return a function that adds a webhook without a server for a kind of the run's objects."""

    def put(workspace: Workspace, name: str) -> None:
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
        hook = {
            "name": "policy.example.com",
            "rules": [rule],
            "clientConfig": {"url": "https://127.0.0.1:1/validate"},
            "objectSelector": {"matchLabels": {RUN_LABEL: name}},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": workspace.namespace}},
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "timeoutSeconds": 2,
        }
        body = build_object(
            "ValidatingWebhookConfiguration", build_unique_name(workspace, name), ADMISSION, webhooks=[hook]
        )
        workspace.api.create(WEBHOOKS, body)

    return put


ADMISSION = "admissionregistration.k8s.io/v1"


def build_unique_name(workspace: Workspace, name: str) -> str:
    """Return a name for an object without a namespace."""
    return f"{workspace.namespace}-{name}"


def occupy_name(
    resource: Resource, kind: str, api_version: str, suffix: str, **spec: Any
) -> Callable[[Workspace, str], None]:
    def put(workspace: Workspace, name: str) -> None:
        body = build_object(kind, name + suffix, api_version, namespace=workspace.namespace, spec=spec)
        workspace.api.create(resource, body)

    return put


def free_name(resource: Resource, suffix: str) -> RunAction:
    return lambda workspace, run: workspace.api.delete(resource, run.name + suffix, workspace.namespace)


def edit_and_restart(**spec: Any) -> RunAction:
    """Return a function that edits the spec and requests a restart, because edits apply to the next attempt."""

    def unblock(workspace: Workspace, run: StubRun) -> None:
        run.edit(**spec)
        run.request_restart("draw-a")

    return unblock


def label_node(workspace: Workspace, run: StubRun) -> None:
    node = workspace.api.list(NODES)[0]["metadata"]["name"]
    workspace.api.patch(NODES, node, {"metadata": {"labels": {workspace.namespace: "wanted"}}})


def add_claim_and_volume(workspace: Workspace, run: StubRun) -> None:
    workspace.add_volume(build_unique_name(workspace, run.name), run.name)
    workspace.add_claim(run.name, build_unique_name(workspace, run.name))


def add_broken_volume(workspace: Workspace, name: str) -> None:
    workspace.add_volume(
        build_unique_name(workspace, name), name, path=str(workspace.storage / "absent"), type="Directory"
    )
    workspace.add_claim(name, build_unique_name(workspace, name))


def make_folder(workspace: Workspace, run: StubRun) -> None:
    folder = workspace.storage / "absent"
    folder.mkdir()
    folder.chmod(0o777)


UNRELATED_POD = {
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
"""The spec of a pod without a run that the restricted Pod Security Standard allows."""
BLOCKED_STARTS = [
    BlockedStart(
        name="cpu",
        reason="Unschedulable",
        message="nodes are available: 2 Insufficient cpu",
        spec={"workers": {"resources": {"requests": {"cpu": "1000"}}}},
        unblock=edit_and_restart(workers={"resources": None}),
        attempts=2,
    ),
    BlockedStart(
        name="selector",
        reason="Unschedulable",
        message="didn't match Pod's node affinity/selector",
        spec={"workers": {"nodeSelector": {"$namespace": "wanted"}}},
        unblock=label_node,
    ),
    BlockedStart(
        name="pods-quota",
        reason="QuotaExceeded",
        message="exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0",
        block=add_quota(pods="0"),
        unblock=lambda workspace, run: workspace.api.delete(QUOTAS, "none", workspace.namespace),
        workspace="pods",
    ),
    BlockedStart(
        name="jobs-quota",
        reason="QuotaExceeded",
        message="exceeded quota: none, requested: count/jobs.batch=1, used: count/jobs.batch=0",
        block=add_quota(**{"count/jobs.batch": "0"}),
        unblock=lambda workspace, run: workspace.api.delete(QUOTAS, "none", workspace.namespace),
        workspace="jobs",
    ),
    BlockedStart(
        name="memory-quota",
        reason="QuotaExceeded",
        message="failed quota: none: must specify limits.memory for: worker",
        block=add_quota(**{"limits.memory": "64Mi"}),
        unblock=edit_and_restart(workers={"resources": {"limits": {"memory": "32Mi"}}}),
        workspace="memory",
        attempts=2,
    ),
    BlockedStart(
        name="scheduler",
        reason="Unschedulable",
        message="no-such-scheduler",
        spec={"workers": {"schedulerName": "no-such-scheduler"}},
        unblock=edit_and_restart(workers={"schedulerName": None}),
        attempts=2,
    ),
    BlockedStart(
        name="image",
        reason="ImagePullFailed",
        message="no-such-worker:1",
        spec={"image": "localhost:5000/no-such-worker:1"},
        unblock=lambda workspace, run: edit_and_restart(image=workspace.image)(workspace, run),
        attempts=2,
    ),
    BlockedStart(
        name="no-claim",
        reason="VolumeNotReady",
        message='persistentvolumeclaim "no-claim" not found',
        spec={"storage": {"volumeClaim": "no-claim"}},
        unblock=add_claim_and_volume,
    ),
    BlockedStart(
        name="unbound",
        reason="VolumeNotReady",
        message="unbound immediate PersistentVolumeClaims",
        spec={"storage": {"volumeClaim": "unbound"}},
        block=lambda workspace, name: workspace.add_claim(name),
        unblock=lambda workspace, run: workspace.add_volume(build_unique_name(workspace, run.name), run.name),
    ),
    BlockedStart(
        name="template",
        reason="VolumeNotReady",
        message="unbound immediate PersistentVolumeClaims",
        spec={
            "storage": {
                "volumeClaimTemplate": {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
            }
        },
        unblock=lambda workspace, run: workspace.add_volume(
            build_unique_name(workspace, run.name), f"{run.name}-storage"
        ),
    ),
    BlockedStart(
        name="folder",
        reason="VolumeNotReady",
        message="FailedMount: MountVolume.SetUp failed for volume",
        spec={"storage": {"volumeClaim": "folder"}},
        block=add_broken_volume,
        unblock=make_folder,
    ),
    BlockedStart(
        name="no-pods",
        reason="AdmissionDenied",
        message="no pods on Fridays",
        block=deny_creation("pods", ""),
        unblock=lambda workspace, run: remove_admission(workspace, run.name),
    ),
    BlockedStart(
        name="no-jobs",
        reason="AdmissionDenied",
        message="no jobs on Fridays",
        block=deny_creation("jobs", "batch"),
        unblock=lambda workspace, run: remove_admission(workspace, run.name),
    ),
    BlockedStart(
        name="webhook-pods",
        reason="AdmissionDenied",
        message='failed calling webhook "policy.example.com"',
        block=break_webhook("pods", ""),
        unblock=lambda workspace, run: remove_admission(workspace, run.name),
    ),
    BlockedStart(
        name="webhook-jobs",
        reason="AdmissionDenied",
        message='failed calling webhook "policy.example.com"',
        block=break_webhook("jobs", "batch"),
        unblock=lambda workspace, run: remove_admission(workspace, run.name),
    ),
    BlockedStart(
        name="job",
        reason="NameConflict",
        message="Job job-draw-a-1 exists and is not owned by this run; delete it or rename the run",
        block=occupy_name(JOBS, "Job", "batch/v1", "-draw-a-1", suspend=True, template={"spec": UNRELATED_POD}),
        unblock=free_name(JOBS, "-draw-a-1"),
    ),
    BlockedStart(
        name="service",
        reason="NameConflict",
        message="Service service exists and is not owned by this run; delete it or rename the run",
        stub="meet",
        nodes=2,
        block=occupy_name(SERVICES, "Service", "v1", "", ports=[{"port": 80}]),
        unblock=free_name(SERVICES, ""),
    ),
    BlockedStart(
        name="policy",
        reason="NameConflict",
        message="NetworkPolicy policy exists and is not owned by this run; delete it or rename the run",
        block=occupy_name(
            NETWORK_POLICIES, "NetworkPolicy", "networking.k8s.io/v1", "", podSelector={"matchLabels": {"app": "other"}}
        ),
        unblock=free_name(NETWORK_POLICIES, ""),
    ),
    BlockedStart(
        name="claim",
        reason="NameConflict",
        message="PersistentVolumeClaim claim-storage exists and is not owned by this run; delete it or rename the run",
        spec={
            "storage": {
                "volumeClaimTemplate": {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
            }
        },
        block=lambda workspace, name: workspace.add_claim(f"{name}-storage"),
        unblock=lambda workspace, run: [
            workspace.api.delete(CLAIMS, f"{run.name}-storage", workspace.namespace),
            workspace.add_volume(build_unique_name(workspace, run.name), f"{run.name}-storage"),
        ],
    ),
    BlockedStart(
        name="priority",
        reason="Forbidden",
        message="no PriorityClass with name no-such-priority was found",
        spec={"workers": {"priorityClassName": "no-such-priority"}},
        unblock=edit_and_restart(workers={"priorityClassName": None}),
        attempts=2,
    ),
    BlockedStart(
        name="gate",
        reason="GateNotPassed",
        message="stage draw-a: gate failed: score is 0.5, but must be at least 0.9; relax the gate's bound",
        spec={"stages": [build_stage("draw-a", gate={"metric": "score", "atLeast": "0.9", "onFail": "Pause"})]},
        unblock=lambda workspace, run: run.edit(
            stages=[build_stage("draw-a", gate={"metric": "score", "atLeast": "0.4", "onFail": "Pause"})]
        ),
    ),
]


def create_blocked_run(blocked: BlockedStart, workspace: Workspace) -> StubRun:
    """Create the run of a blocked start."""
    spec = fill_in_namespace(blocked.spec, workspace.namespace)
    return StubRun(workspace, blocked.name, blocked.stub, nodes=blocked.nodes, **spec)


def delete_cluster_objects(workspace: Workspace) -> None:
    """Delete what is not deleted with the namespace."""
    for blocked in BLOCKED_STARTS:
        remove_admission(workspace, blocked.name)
    for node in workspace.api.list(NODES, selector=workspace.namespace):
        workspace.api.patch(NODES, node["metadata"]["name"], {"metadata": {"labels": {workspace.namespace: None}}})


def fill_in_namespace(spec: Any, namespace: str) -> Any:
    if not isinstance(spec, dict):
        return spec
    return {name.replace("$namespace", namespace): fill_in_namespace(value, namespace) for name, value in spec.items()}


def is_denied(workspace: Workspace, run: str) -> bool:
    """Return whether a policy or webhook is in force, which takes a moment."""
    labels = {RUN_LABEL: run}
    pod = build_object("Pod", "probe", namespace=workspace.namespace, labels=labels, spec=UNRELATED_POD)
    job = build_object("Job", "probe", "batch/v1", namespace=workspace.namespace, labels=labels)
    job["spec"] = {"suspend": True, "template": {"spec": UNRELATED_POD}}
    resource, body = (PODS, pod) if run.endswith("pods") else (JOBS, job)
    try:
        workspace.api.create(resource, body, dry_run=True)
    except ApiStatusError as error:
        return "webhook" in str(error) or "Fridays" in str(error)
    return False
