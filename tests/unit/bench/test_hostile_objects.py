"""Hostile objects of the benchmark: large ones are as large as intended, and forged ones pass for a run's own."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bench.operator import hostile_objects as hostile
from bench.operator.hostile_objects import Manifest, count_bytes
from bench.operator.scenarios import build_run
from bench.operator.worker_servers import SLOW_SECONDS, build_answers
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.parse import MAX_SPEC_BYTES, parse_run
from sailvl_operator.api.types import Run
from sailvl_operator.api.validation import fill_defaults
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.parse import parse_job, parse_network_policy, parse_pod
from sailvl_operator.cluster.progress import TIMEOUT_SECONDS
from sailvl_operator.core.ownership import is_own_job, select_pods

MIB = 1 << 20
ETCD_LIMIT = 1.5 * MIB
"""Largest object that etcd takes; the API server stores runs as JSON."""
REQUEST_LIMIT = 3 * MIB
"""Largest request that the API server reads."""


def store(manifest: Manifest, uid: str = "uid") -> Manifest:
    """Return a manifest with the metadata that the API server adds."""
    added = {"namespace": "hostile", "uid": uid, "resourceVersion": "1", "generation": 1}
    return manifest | {"metadata": manifest["metadata"] | added}


def parse(build: Any, kind: Any, manifest: Manifest) -> Any:
    """Decode a manifest as an informer does, and parse it."""
    return build(msgspec.json.decode(msgspec.json.encode(manifest), type=kind))


@pytest.fixture(scope="module")
def run() -> Manifest:
    return store(build_run("hostile-0001", 2), "run-uid")


@pytest.fixture(scope="module")
def parsed_run(run: Manifest) -> Run:
    return parse_run(run)


def test_large_run_is_accepted_by_the_operator_with_the_defaults_of_the_schema() -> None:
    manifest = hostile.build_large_run(7)
    spec = fill_defaults(manifest["spec"], build_schema()["properties"]["spec"])
    assert 0.99 * MAX_SPEC_BYTES < count_bytes(spec) <= MAX_SPEC_BYTES
    run = parse_run(store(manifest | {"spec": spec}))
    assert len(run.spec.stages) == 32
    assert run.name == "large-007"


@pytest.mark.parametrize("number", range(len(hostile.WIDE_METADATA)))
def test_wide_run_fits_into_a_request_and_into_etcd(number: int) -> None:
    manifest = hostile.build_wide_run(number)
    assert 0.5 * MIB < count_bytes(manifest) < ETCD_LIMIT
    assert parse_run(store(manifest)).name == f"wide-{number:03}"


def test_each_kind_of_metadata_is_wide_in_one_run() -> None:
    kinds = {kind for n in range(5) for kind, part in hostile.build_wide_run(n)["metadata"].items() if len(part) > 30}
    assert kinds == {"labels", "annotations", "ownerReferences", "finalizers", "managedFields"}


@pytest.mark.parametrize("number", [0, 1])
def test_large_policy_fits_into_a_request_and_belongs_to_the_run(number: int, run: Manifest) -> None:
    manifest = store(hostile.build_large_policy(number, run))
    assert count_bytes(manifest) < REQUEST_LIMIT
    [rule] = manifest["spec"]["ingress"]
    assert sum(len(entries) for entries in rule.values()) >= 150_000
    policy = parse(lambda raw: parse_network_policy(raw, metrics_peers=()), resources.NetworkPolicy, manifest)
    assert (policy.run, policy.owner_uid, policy.is_current) == ("hostile-0001", "run-uid", False)


@pytest.mark.parametrize("attempt", [2, 3])
def test_forged_job_passes_for_an_attempt_of_the_run(attempt: int, run: Manifest, parsed_run: Run) -> None:
    job = parse(parse_job, resources.Job, store(hostile.build_forged_job(run, attempt)))
    assert is_own_job(parsed_run, job)
    assert (job.stage, job.attempt, bool(job.alteration)) == ("instruction", attempt, attempt % 2 == 1)


def test_wide_job_has_many_containers(run: Manifest) -> None:
    manifest = hostile.build_forged_job(run, 2, containers=2000)
    containers = {container["name"] for container in manifest["spec"]["template"]["spec"]["containers"]}
    assert len(containers) == 2000
    assert count_bytes(manifest) < REQUEST_LIMIT


def test_forged_pod_passes_for_a_worker_of_a_forged_job(run: Manifest, parsed_run: Run) -> None:
    forged = store(hostile.build_forged_job(run, 2), "job-uid")
    job = parse(parse_job, resources.Job, forged)
    pod = parse(parse_pod, resources.Pod, store(hostile.build_forged_pod(3, run, forged), "pod-uid"))
    assert list(select_pods(parsed_run, [job], [pod])) == [pod]


@pytest.mark.parametrize(("number", "kind", "least"), [(0, "ownerReferences", 4_400), (1, "labels", 8_600)])
def test_wide_pod_passes_for_a_worker_and_has_wide_metadata(
    number: int, kind: str, least: int, run: Manifest, parsed_run: Run
) -> None:
    forged = store(hostile.build_forged_job(run, 2), "job-uid")
    manifest = store(hostile.build_wide_pod(number, run, forged), "pod-uid")
    assert least < len(manifest["metadata"][kind])
    assert count_bytes(manifest) < REQUEST_LIMIT
    pod = parse(parse_pod, resources.Pod, manifest)
    assert list(select_pods(parsed_run, [parse(parse_job, resources.Job, forged)], [pod])) == [pod]


def test_slow_answers_arrive_just_before_the_operator_stops_waiting() -> None:
    assert 0.9 * TIMEOUT_SECONDS < SLOW_SECONDS < TIMEOUT_SECONDS
    assert SLOW_SECONDS in {seconds for seconds, _ in build_answers()}
