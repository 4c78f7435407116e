"""The manifests of an attempt, whole: a Job's every field is a promise to the cluster."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from sailvl_operator.api import names
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.core.decision import AttemptSpec
from sailvl_operator.core.desired.manifests import build_claim, build_job, build_service
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.jobs import build_attempt
from sailvl_operator.core.plan import plan
from sailvl_trainer.contract import Env
from tests.support.builders.operator import build_run

OUTPUTS = {"curate": "demo/curate-0", "alignment": "demo/alignment-0", "knowledge": "demo/knowledge-0"}


def make_attempt(run: Run, stage: int = 1, **nodes: tuple[str, ...]) -> AttemptSpec:
    return build_attempt(
        run, plan(run)[stage], attempt=2, outputs=OUTPUTS, defaults=Defaults(grace_seconds=90), **nodes
    )


def make_job(attempt: AttemptSpec) -> dict[str, Any]:
    """As the API server gets it."""
    return json.loads(msgspec.json.encode(build_job(attempt, build_appdef(attempt, rendezvous_secret="1a2b"))))


OWNER = {
    "apiVersion": "sailvl.dev/v1alpha1",
    "kind": "SailVLRun",
    "name": "demo",
    "uid": "run-uid",
    "controller": True,
    "blockOwnerDeletion": True,
}
RUN_LABELS = {"app.kubernetes.io/managed-by": "sailvl-operator", "sailvl.dev/run": "demo"}
LABELS = RUN_LABELS | {"sailvl.dev/stage": "alignment", "sailvl.dev/attempt": "2"}
POD_LABELS = LABELS | {"sailvl.dev/run-uid": "run-uid"}
LOST = [
    {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 20}
    for taint in ("not-ready", "unreachable")
]
ENV = [
    {"name": "SAILVL_STAGE_FILE", "value": "/etc/sailvl/stage.json"},
    {"name": "SAILVL_NODES", "value": "2"},
    {"name": "SAILVL_RENDEZVOUS_HOST", "value": "demo-alignment-2-0.demo"},
    {"name": "SAILVL_IN_PLACE_RESTARTS", "value": "3"},
    {"name": "SAILVL_GRACE_SECONDS", "value": "85"},
    {"name": "SAILVL_STALL_TIMEOUT_SECONDS", "value": "900"},
    {"name": "SAILVL_RENDEZVOUS_SECRET", "value": "1a2b"},
    {
        "name": "SAILVL_NODE_RANK",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-completion-index']"}},
    },
    {"name": "SAILVL_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    {"name": "SAILVL_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
]
CONTAINER = {
    "name": "worker",
    "image": "registry.example.com/sailvl-trainer:0.1.0",
    "imagePullPolicy": "IfNotPresent",
    "command": ["python", "-m", "sailvl_trainer"],
    "env": ENV,
    "ports": [{"name": "metrics", "containerPort": 9400, "protocol": "TCP"}],
    "resources": {},
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    },
    "terminationMessagePolicy": "FallbackToLogsOnError",
    "volumeMounts": [
        {"name": "storage", "mountPath": "/data"},
        {"name": "stage", "mountPath": "/etc/sailvl", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ],
}
POD_SPEC = {
    "restartPolicy": "Never",
    "subdomain": "demo",
    "terminationGracePeriodSeconds": 90,
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    },
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": "demo-alignment-2"}},
        }
    ],
    "tolerations": LOST,
    "containers": [CONTAINER],
    "volumes": [
        {"name": "storage", "persistentVolumeClaim": {"claimName": "sail-data"}},
        {
            "name": "stage",
            "downwardAPI": {
                "items": [
                    {
                        "path": "stage.json",
                        "fieldRef": {"fieldPath": "metadata.annotations['sailvl.dev/stage.json']"},
                    }
                ]
            },
        },
        {"name": "tmp", "emptyDir": {"sizeLimit": "100Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ],
}


def test_job_of_an_attempt_is_complete():
    job = make_job(make_attempt(build_run()))
    document = job["spec"]["template"]["metadata"].pop("annotations").pop("sailvl.dev/stage.json")
    assert job == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "demo-alignment-2",
            "namespace": "team",
            "labels": LABELS | {"sailvl.dev/digest": plan(build_run())[1].digest[:12]},
            "ownerReferences": [OWNER],
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimitPerIndex": 0,
            "podReplacementPolicy": "Failed",
            "suspend": False,
            "template": {"metadata": {"labels": POD_LABELS}, "spec": POD_SPEC},
        },
    }
    config = json.loads(document)
    assert (config["stage"], config["attempt"], config["kind"]) == ("alignment", 2, "pretrain")
    assert config["train"]["data"] == ["/data/demo/curate-0"]


def bend(**workers: Any) -> dict[str, Any]:
    """The Job of a run whose workers have more to say."""
    return make_job(make_attempt(build_run(workers={"nodes": 2, "gpusPerNode": 0} | workers)))


def pod_spec(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    return pod_spec(job)["containers"][0]


def size_limits(job: dict[str, Any]) -> dict[str, str]:
    return {v["name"]: v["emptyDir"]["sizeLimit"] for v in pod_spec(job)["volumes"] if "emptyDir" in v}


def environment(job: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in container(job)["env"]}


@pytest.mark.parametrize(
    ("workers", "look", "expected"),
    [
        pytest.param(
            {"gpusPerNode": 8, "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "64Gi"}}},
            lambda job: container(job)["resources"],
            {
                "requests": {"cpu": "4", "nvidia.com/gpu": "8"},
                "limits": {"memory": "64Gi", "nvidia.com/gpu": "8"},
            },
            id="GPUs",
        ),
        pytest.param(
            {"queueName": "gold"},
            lambda job: (job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], job["spec"]["suspend"]),
            ("gold", True),
            id="queued Jobs are created suspended",
        ),
        pytest.param(
            {"labels": {"pod-group": "g", names.LABEL_RUN: "another"}},
            lambda job: job["spec"]["template"]["metadata"]["labels"],
            POD_LABELS | {"pod-group": "g"},
            id="labels of the operator can't be replaced",
        ),
        pytest.param(
            {"nodeSelector": {"zone": "a"}, "priorityClassName": "high", "schedulerName": "volcano"},
            lambda job: {k: pod_spec(job)[k] for k in ("nodeSelector", "priorityClassName", "schedulerName")},
            {"nodeSelector": {"zone": "a"}, "priorityClassName": "high", "schedulerName": "volcano"},
            id="placement",
        ),
        pytest.param(
            {"serviceAccountName": "trainer"},
            lambda job: (pod_spec(job)["serviceAccountName"], pod_spec(job)["automountServiceAccountToken"]),
            ("trainer", False),
            id="service account without its token",
        ),
        pytest.param(
            {"resources": {"limits": {"memory": "64Gi", "ephemeral-storage": "20Gi"}}},
            size_limits,
            {"tmp": "20Gi", "shm": "64Gi"},
            id="volumes are limited as the pod is",
        ),
        pytest.param(
            {"temporaryStorage": "5Gi", "sharedMemory": "1Gi", "resources": {"limits": {"memory": "64Gi"}}},
            size_limits,
            {"tmp": "5Gi", "shm": "1Gi"},
            id="sizes of volumes",
        ),
        pytest.param(
            {"tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]},
            lambda job: pod_spec(job)["tolerations"],
            [*LOST, {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            id="tolerations",
        ),
        pytest.param(
            {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HF_HOME", "value": "/data/hf"}]},
            lambda job: (environment(job)["NCCL_DEBUG"], environment(job)["HF_HOME"]),
            ("INFO", "/data/hf"),
            id="environment",
        ),
        pytest.param(
            {"env": [{"name": f"SAILVL_{name}", "value": "7"} for name in ("NODES", "NODE_RANK", "METRICS_PORT")]},
            lambda job: container(job)["env"],
            ENV,
            id="the contract's variables can't be replaced",
        ),
        pytest.param(
            {"envFrom": [{"secretRef": {"name": "tokens"}}, {"configMapRef": {"name": "proxy", "optional": True}}]},
            lambda job: container(job)["envFrom"],
            [{"secretRef": {"name": "tokens"}}, {"configMapRef": {"name": "proxy", "optional": True}}],
            id="envFrom",
        ),
    ],
)
def test_worker_settings_appear_in_the_job(workers, look, expected):
    assert look(bend(**workers)) == expected


def test_env_includes_defaults_that_a_secret_could_override():
    job = bend(envFrom=[{"secretRef": {"name": "tokens"}}])
    env = environment(job)
    assert (env["SAILVL_DEVICE"], env["SAILVL_TERMINATION_LOG"]) == ("cpu", "/dev/termination-log")
    assert set(env) == set(map(str, Env))


@pytest.mark.parametrize("env_from", [[], [{"secretRef": {"name": "tokens"}}]], ids=["plain", "with envFrom"])
def test_every_variable_is_given_once(env_from):
    for nodes in (1, 2):
        given = [variable["name"] for variable in container(bend(nodes=nodes, envFrom=env_from))["env"]]
        assert sorted(given) == sorted(set(given))


def test_single_worker_gets_neither_the_secret_nor_the_address_of_a_rendezvous():
    env = environment(bend(nodes=1))
    assert not env.keys() & {"SAILVL_RENDEZVOUS_SECRET", "SAILVL_POD_IP"}


def test_suspect_node_is_avoided_by_preference():
    job = make_job(make_attempt(build_run(), suspect_nodes=("node-a",)))
    other = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-a"]}]}
    assert pod_spec(job)["affinity"]["nodeAffinity"] == {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": other}]
    }


def test_excluded_nodes_are_forbidden():
    job = make_job(make_attempt(build_run(), excluded_nodes=("node-b", "node-a")))
    assert pod_spec(job)["affinity"]["nodeAffinity"] == {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {
                    "matchFields": [
                        {"key": "metadata.name", "operator": "NotIn", "values": ["node-a"]},
                        {"key": "metadata.name", "operator": "NotIn", "values": ["node-b"]},
                    ]
                }
            ]
        }
    }


def test_builders_do_not_modify_their_inputs():
    attempt = make_attempt(
        build_run(workers={"nodes": 2, "gpusPerNode": 8, "resources": {"limits": {"memory": "1Gi"}}})
    )
    assert make_job(attempt) == make_job(attempt)


def test_service_of_a_run_is_complete():
    assert build_service(namespace="team", run="demo", owner_uid="run-uid") == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "demo", "namespace": "team", "labels": RUN_LABELS, "ownerReferences": [OWNER]},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": RUN_LABELS,
            "ports": [
                {"name": "metrics", "port": 9400, "protocol": "TCP"},
                {"name": "rendezvous", "port": 29500, "protocol": "TCP"},
            ],
        },
    }


@pytest.mark.parametrize(
    ("storage", "spec"),
    [
        pytest.param({"volumeClaim": "sail-data"}, None, id="an existing claim"),
        pytest.param(
            {"volumeClaimTemplate": {"resources": {"requests": {"storage": "1Ti"}}}},
            {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}},
            id="the default class",
        ),
        pytest.param(
            {
                "volumeClaimTemplate": {
                    "storageClassName": "fast",
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Gi"}},
                }
            },
            {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "fast",
            },
            id="a class",
        ),
    ],
)
def test_claim_follows_the_template(storage, spec):
    metadata = {"name": "demo-storage", "namespace": "team", "labels": RUN_LABELS}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}
    assert build_claim(build_run(storage=storage)) == (spec and claim)


def test_claim_that_is_deleted_with_its_run_has_an_owner():
    template = {"resources": {"requests": {"storage": "1Ti"}}}
    claim = build_claim(build_run(storage={"volumeClaimTemplate": template, "whenDeleted": "Delete"}))
    assert claim["metadata"]["ownerReferences"] == [OWNER]
