"""Builders of the objects that a hostile tenant creates: each is as large, or as close to a real one, as the API server
accepts. Used by `hostile_tenant.py`.

Two limits apply to the size of an object. A request may have 3 MiB, and etcd takes 1.5 MiB: of a run as JSON, of
Kubernetes' own kinds as protocol buffers, which for short entries are several times smaller than the JSON that the
operator reads. Metadata counts about twice, because the API server tracks the owner of each field in managedFields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from bench.operator.scenarios import build_run
from sailvl_operator.api import names
from sailvl_operator.api.parse import MAX_SPEC_BYTES
from sailvl_operator.api.workers import MAX_NODES

Manifest = dict[str, Any]

INT32_MAX = 2**31 - 1
STAGE = "instruction"
"""Name of the stage of `scenarios.build_run`."""
MISSING_CONTROLLER = "hostile.example.com/missing"
"""Controller of forged Jobs. The Job controller leaves their pods alone, so that forged ones are not deleted."""
IMAGE = "registry.example.com/hostile"
_LONG_PREFIX = "hostile" * 8 + ".example"
"""Prefix of the names of labels and finalizers. Long names make an object large at a third of the time that the API
server takes for short ones."""
SPEC_SLACK_BYTES = 1024
"""Bytes by which the spec of a large run stays below the operator's limit: room for the defaults of the schema."""
_VARIABLES = 64
"""Maximum number of environment variables of a stage."""
_VALUE_LENGTH = 1024
"""Maximum length of the value of an environment variable."""


def build_large_run(number: int) -> Manifest:
    """Build a valid run whose spec is just smaller than the operator accepts: many benchmarks and long environments."""
    run = build_run(f"large-{number:03}", 2)
    benchmarks = [
        {"name": f"c{n:02}", "path": f"/data/{n}", "metric": "anls", "group": "g", "maxTiles": 6} for n in range(32)
    ]
    scores = [{"name": f"s{n:02}", "evaluate": {"custom": benchmarks, "limit": 0}} for n in range(31)]
    run["spec"]["stages"] += scores
    for stage in run["spec"]["stages"]:
        if environment := _build_environment(MAX_SPEC_BYTES - SPEC_SLACK_BYTES - count_bytes(run["spec"])):
            stage["workers"] = {"env": environment}
    return run


def _build_environment(room_bytes: int) -> list[dict[str, str]]:
    """Build as many variables as a stage may have, or as many as fit into `room_bytes` of JSON."""
    variable = count_bytes({"name": "V00", "value": "v" * _VALUE_LENGTH}) + 1
    count = min(_VARIABLES, max(0, room_bytes - 32) // variable)
    return [{"name": f"V{n:02}", "value": "v" * _VALUE_LENGTH} for n in range(count)]


def build_wide_run(number: int) -> Manifest:
    """Build a run whose metadata makes it as large as etcd takes; the kinds of metadata take turns."""
    build, count = WIDE_METADATA[number % len(WIDE_METADATA)]
    run = build_run(f"wide-{number:03}", 2)
    run["metadata"] |= build(count)
    return run


def build_large_policy(number: int, run: Manifest) -> Manifest:
    """Build a NetworkPolicy of a run, with the largest JSON that etcd takes: short entries, which the API server
    completes with default values."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _build_metadata(f"{run['metadata']['name']}-{number}", run, attempt=0),
    }
    return policy | {"spec": build_large_policy_spec(number)}


def build_large_policy_spec(number: int) -> Manifest:
    """Build a spec with 200,000 ports or 150,000 peers in turn."""
    rules: list[Manifest] = [{"ports": [{}] * 200_000}, {"from": [{"podSelector": {}}] * 150_000}]
    return {"podSelector": {}, "ingress": [rules[number % 2]]}


def build_forged_job(run: Manifest, attempt: int, *, containers: int = 1) -> Manifest:
    """Build a Job that has the name, the labels and the controller of a run's attempt, but no pods, since it names a
    controller that does not exist.

    The shape is that of a Job with as many workers as possible or, for every second attempt, one that no operator
    creates: more completions than any list of indexes has room for.
    """
    is_valid = attempt % 2 == 0
    shape = {"completionMode": "Indexed"} if is_valid else {}
    count = MAX_NODES if is_valid else INT32_MAX
    template = [{"name": names.CONTAINER, "image": IMAGE}] + [
        {"name": f"c{n:04}", "image": f"{IMAGE}/{'i' * 300}"} for n in range(containers - 1)
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _build_metadata(names.job_name(run["metadata"]["name"], STAGE, attempt), run, attempt=attempt),
        "spec": shape
        | {
            "completions": count,
            "parallelism": count,
            "managedBy": MISSING_CONTROLLER,
            "template": {"spec": {"restartPolicy": "Never", "containers": template}},
        },
    }


def build_forged_pod(number: int, run: Manifest, job: Manifest, *, index: int = 0) -> Manifest:
    """Build a pod that has the name, the labels and the controller of a worker of a run's Job."""
    metadata = job["metadata"]
    attempt = metadata["labels"][names.LABEL_ATTEMPT]
    labels = _build_labels(run, attempt=attempt) | {
        names.LABEL_RUN_UID: run["metadata"]["uid"],
        names.LABEL_JOB_NAME: metadata["name"],
        "batch.kubernetes.io/controller-uid": metadata["uid"],
        names.LABEL_COMPLETION_INDEX: str(index),
    }
    owner = _build_controller("batch/v1", "Job", metadata)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{metadata['name']}-{index}-f{number:05}",
            "labels": labels,
            "ownerReferences": [owner],
        },
        "spec": {
            "nodeName": f"node-{number % 20}",
            "containers": [{"name": names.CONTAINER, "image": IMAGE}],
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
        },
    }


def build_wide_pod(number: int, run: Manifest, job: Manifest) -> Manifest:
    """Build a forged pod with as many owner references or labels of the operator as etcd takes, in turn."""
    pod = build_forged_pod(number, run, job)
    metadata = pod["metadata"]
    if number % 2:
        metadata["labels"] |= {f"{names.GROUP}/{'l' * 50}{n:05}": "v" for n in range(8_600)}
    else:
        references = _build_owner_references(4_400)["ownerReferences"]
        metadata["ownerReferences"] = references + metadata["ownerReferences"]
    return pod


def count_bytes(value: object) -> int:
    """Return the size of a value as compact JSON."""
    return len(msgspec.json.encode(value))


def _build_metadata(name: str, run: Manifest, *, attempt: int) -> Manifest:
    """Build the metadata of an object of a run with the run's real UID, or of one of its attempts if `attempt` is not
    0."""
    labels = _build_labels(run, attempt=str(attempt) if attempt else "")
    owner = _build_controller(names.API_VERSION, names.KIND, run["metadata"])
    return {"name": name, "labels": labels, "ownerReferences": [owner]}


def _build_labels(run: Manifest, *, attempt: str) -> dict[str, str]:
    labels = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_RUN: run["metadata"]["name"]}
    return labels | ({names.LABEL_STAGE: STAGE, names.LABEL_ATTEMPT: attempt} if attempt else {})


def _build_controller(version: str, kind: str, owner: Manifest) -> Manifest:
    return {"apiVersion": version, "kind": kind, "name": owner["name"], "uid": owner["uid"], "controller": True}


def _build_filler_labels(count: int) -> Manifest:
    return {"labels": {f"{_LONG_PREFIX}/{'l' * 40}-{n:05}": "v" for n in range(count)}}


def _build_annotations(count: int) -> Manifest:
    """Build as many annotations as the API server accepts, 256 KiB, and `count` labels."""
    return {"annotations": {f"annotation-{n:05}": "v" * 112 for n in range(2_000)}} | _build_filler_labels(count)


def _build_owner_references(count: int) -> Manifest:
    reference = {"apiVersion": "v1", "kind": "K", "name": "n" * 200}
    return {"ownerReferences": [reference | {"uid": f"{'u' * 31}{n:05}"} for n in range(count)]}


def _build_finalizers(count: int) -> Manifest:
    return {"finalizers": [f"{_LONG_PREFIX}/{'f' * 40}{n:05}" for n in range(count)]}


def _build_managed_fields(count: int) -> Manifest:
    """Build the entries of 32 field managers with `count` fields each."""
    entry = {
        "apiVersion": names.API_VERSION,
        "operation": "Apply",
        "time": "2026-01-01T00:00:00Z",
        "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:annotations": {f"f:{'a' * 110}{n:05}": {} for n in range(count)}}},
    }
    return {"managedFields": [entry | {"manager": f"manager-{n:02}"} for n in range(32)]}


WIDE_METADATA: tuple[tuple[Callable[[int], Manifest], int], ...] = (
    (_build_filler_labels, 5_600),
    (_build_annotations, 4_200),
    (_build_owner_references, 4_200),
    (_build_finalizers, 5_600),
    (_build_managed_fields, 350),
)
"""Builders of metadata with the number of entries that make a run 1.3 to 1.4 MiB large, which leaves room for its
status."""
