"""Objects with a run's labels that the operator didn't create, and Jobs of a run that were edited."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from msgspec.structs import replace

from sailvl_operator.api.workers import MAX_GPUS, MAX_NODES
from sailvl_operator.cluster.parse import parse_job, parse_pod, parse_service
from sailvl_operator.core.desired.manifests import build_job as build_job_manifest
from sailvl_operator.core.desired.manifests import build_service
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.lifecycle import LOST_JOB_SECONDS
from sailvl_operator.core.observe import JobRecord, observe
from sailvl_operator.core.ownership import (
    is_job_evidence,
    is_own_job,
    is_own_service,
    is_pod_evidence,
    select_pods,
    split_job_name,
)
from sailvl_operator.core.plan import plan
from sailvl_operator.core.reconcile import reconcile
from tests.support.builders.operator import SPEC, build_job, build_pod, build_run
from tests.support.core_world import DEFAULTS, CoreWorld, finish_run

INT32_MAX = 2**31 - 1
ONE_STAGE = {"stages": SPEC["stages"][2:3]}
STAGE = "knowledge"


def make_job(**changes: Any) -> dict[str, Any]:
    """Build the Job of the first attempt as the API server returns it; `changes` are dotted paths and values."""
    decision = reconcile(build_run(**ONE_STAGE), observe(), now=1000.0, defaults=DEFAULTS)
    [attempt] = decision.start
    job = build_job_manifest(attempt, build_appdef(attempt, rendezvous_secret="1a2b"))
    job["metadata"] |= {"uid": "job-uid", "creationTimestamp": "2026-01-01T00:00:00Z"}
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = job
        for parent in parents:
            target = target[parent]
        target[name] = value
    return job


def make_pod(*, index: str = "0", job_uid: str = "job-uid", **metadata: Any) -> dict[str, Any]:
    """Build a pod of the first attempt as the API server returns it."""
    labels = make_job()["spec"]["template"]["metadata"]["labels"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "demo-knowledge-1", "uid": job_uid, "controller": True}
    known = {
        "namespace": "team",
        "name": f"demo-knowledge-1-{index}-x7k2p",
        "uid": f"pod-{index}",
        "labels": labels | {"batch.kubernetes.io/job-completion-index": index},
        "ownerReferences": [owner],
    }
    return {"metadata": known | metadata, "spec": {}, "status": {"phase": "Running"}}


def list_owned_pods(*pods: dict[str, Any], job: dict[str, Any] | None = None) -> list[str]:
    """Return the names of the pods that count as the run's beside its Job."""
    jobs = [parse_job(job if job is not None else make_job())]
    return [pod.name for pod in select_pods(build_run(), jobs, map(parse_pod, pods))]


def test_created_job_and_its_pods_are_the_runs_own() -> None:
    job = parse_job(make_job())
    assert (is_own_job(build_run(), job), job.alteration, job.stage, job.attempt) == (True, "", STAGE, 1)
    assert len(list_owned_pods(make_pod(), make_pod(index="1"))) == 2


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"metadata__name": "forged"}, id="another name"),
        pytest.param({"metadata__name": "demo-knowledge-01"}, id="number with a leading zero"),
        pytest.param({"metadata__ownerReferences": []}, id="no owner"),
        pytest.param({"metadata__ownerReferences": [{"uid": "run-uid", "kind": "SailVLRun"}]}, id="no controller"),
        pytest.param(
            {"metadata__ownerReferences": [{"uid": "x", "kind": "SailVLRun", "name": "demo", "controller": True}]},
            id="another run of the name",
        ),
        pytest.param(
            {"metadata__ownerReferences": [{"uid": "run-uid", "kind": "Job", "name": "demo", "controller": True}]},
            id="controller of another kind",
        ),
    ],
)
def test_jobs_of_others_are_not_the_runs_own(changes: dict[str, Any]) -> None:
    assert not is_own_job(build_run(), parse_job(make_job(**changes)))


@pytest.mark.parametrize(
    ("changes", "alteration"),
    [
        pytest.param({"spec__completions": 3}, "completions is 3 and parallelism 2", id="completions"),
        pytest.param({"spec__parallelism": 0}, "completions is 2 and parallelism 0", id="parallelism"),
        pytest.param({"spec__completions": None}, "completions is None", id="no completions"),
        pytest.param({"spec__completionMode": "NonIndexed"}, "completionMode is NonIndexed", id="mode"),
        pytest.param(
            {"spec__completions": INT32_MAX, "spec__parallelism": INT32_MAX},
            "completions is 2147483647, not between 1 and 9999",
            id="huge",
        ),
        pytest.param({"metadata__labels__sailvl.dev/attempt": "7"}, "do not match its name", id="attempt"),
        pytest.param({"metadata__labels__sailvl.dev/stage": "curate"}, "do not match its name", id="stage"),
        pytest.param({"metadata__labels__app.kubernetes.io/managed-by": "me"}, "lacks the label", id="manager"),
    ],
)
def test_altered_job_is_recognised_and_keeps_its_attempt(changes: dict[str, Any], alteration: str) -> None:
    job = parse_job(make_job(**changes))
    assert alteration in job.alteration
    assert (job.stage, job.attempt) == (STAGE, 1)
    assert 1 <= job.nodes <= MAX_NODES


def test_number_of_gpus_is_bounded() -> None:
    job = make_job()
    job["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "9" * 9}}
    assert parse_job(job).gpus == MAX_GPUS


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(make_pod(ownerReferences=[]), id="no owner"),
        pytest.param(make_pod(job_uid="another"), id="another Job of the name"),
        pytest.param(make_pod(name="forged"), id="another name"),
        pytest.param(make_pod(index="1", name="demo-knowledge-1-0-x7k2p"), id="label of another index"),
        pytest.param(make_pod(index="2"), id="index above the completions"),
        pytest.param(make_pod(index="9" * 60), id="huge index"),
        pytest.param(
            make_pod(ownerReferences=[{"kind": "Job", "name": "other", "uid": "job-uid", "controller": True}]),
            id="owner of another name",
        ),
        pytest.param(
            make_pod(ownerReferences=[{"kind": "ReplicaSet", "name": "demo-knowledge-1", "uid": "job-uid"}]),
            id="owner of another kind",
        ),
    ],
)
def test_pods_that_no_job_of_the_run_created_are_ignored(pod: dict[str, Any]) -> None:
    assert list_owned_pods(pod, make_pod()) == ["demo-knowledge-1-0-x7k2p"]


def test_pods_of_a_foreign_job_with_the_name_of_an_attempt_are_ignored() -> None:
    assert list_owned_pods(make_pod(), job=make_job(metadata__ownerReferences=[])) == []


def test_pod_that_is_seen_before_its_job_counts() -> None:
    run = build_run()
    pods = [parse_pod(make_pod())]
    assert list(select_pods(run, [], pods)) == pods
    assert list(select_pods(run, [], [replace(pods[0], run_uid="old-run")])) == []


@pytest.mark.parametrize(
    ("attempt", "index", "name"),
    [
        (1, 9, f"{'r' * 26}-{'s' * 26}-1-9-x7k2p"),
        (1, 10, f"{'r' * 26}-{'s' * 26}--10-x7k2p"),
        (10, 0, f"{'r' * 26}-{'s' * 26}-1-0-x7k2p"),
        (1234, 1234, f"{'r' * 26}-{'s' * 25}-1234-x7k2p"),
    ],
)
def test_pod_of_a_job_with_a_long_name_is_recognised(attempt: int, index: int, name: str) -> None:
    """The Job controller cuts the Job's name, so that index and random suffix fit behind it."""
    job = f"{'r' * 26}-{'s' * 26}-{attempt}"
    labels = {"sailvl.dev/run": "r" * 26, "sailvl.dev/stage": "s" * 26, "sailvl.dev/attempt": str(attempt)}
    pod = make_pod(
        name=name,
        labels=labels | {"batch.kubernetes.io/job-completion-index": str(index)},
        ownerReferences=[{"kind": "Job", "name": job, "uid": "u", "controller": True}],
    )
    assert parse_pod(pod).owner_uid == "u"


def test_service_of_another_name_is_not_the_runs_own() -> None:
    service = build_service(namespace="team", run="demo", owner_uid="run-uid")
    service["metadata"]["uid"] = "service-uid"
    assert is_own_service(build_run(), parse_service(service))
    service["metadata"]["name"] = "other"
    assert not is_own_service(build_run(), parse_service(service))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo-a-1", ("a", 1)),
        ("demo-a-b-12", ("a-b", 12)),
        ("demo-a", ("", 0)),
        ("other-a-1", ("", 0)),
        ("demo--1", ("", 1)),
        ("demo-a-x", ("", 0)),
        ("demo-a-" + "9" * 50, ("a", int("9" * 50))),
    ],
)
def test_stage_and_attempt_follow_from_the_name(name: str, expected: tuple[str, int]) -> None:
    assert split_job_name(name, "demo") == expected


def test_reconcile_builds_nothing_of_the_size_that_a_job_names() -> None:
    world = CoreWorld(spec=ONE_STAGE)
    world.run_until_stable()
    [name] = world.jobs
    world.jobs[name] = replace(world.jobs[name], nodes=300_000)
    tracemalloc.start()
    try:
        world.reconcile_once()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


def alter(world: CoreWorld, job: JobRecord) -> None:
    world.jobs[job.name] = replace(job, alteration="completions is 9 and parallelism 2, which must be equal")


def test_altered_job_is_replaced_by_the_next_attempt_and_deleted() -> None:
    world = CoreWorld(spec=ONE_STAGE)
    world.run_until_stable()
    alter(world, world.jobs["demo-knowledge-1"])
    world.run_until_stable()
    stage = world.stage(STAGE)
    assert (stage.state, stage.attempt, list(world.jobs)) == ("Running", 2, ["demo-knowledge-2"])
    assert stage.last_failure is not None
    assert stage.last_failure.message.startswith("Job demo-knowledge-1 was altered: completions is 9")
    finish_run(world)
    assert world.status.is_finished


def test_forged_first_job_does_not_hold_up_the_run() -> None:
    """A client created a Job with the name and the owner of the first attempt, but in another shape."""
    world = CoreWorld(spec=ONE_STAGE)
    alter(world, build_job(STAGE, nodes=MAX_NODES))
    world.run_until_stable()
    assert (world.stage(STAGE).state, list(world.jobs)) == ("Running", ["demo-knowledge-2"])


def test_altered_job_of_a_suspended_run_is_deleted_and_the_run_resumes() -> None:
    world = CoreWorld(spec=ONE_STAGE)
    world.run_until_stable()
    alter(world, world.jobs["demo-knowledge-1"])
    world.spec, world.generation = ONE_STAGE | {"suspend": True}, 2
    world.run_until_stable()
    assert (world.stage(STAGE).state, world.jobs) == ("Suspended", {})
    world.spec, world.generation = ONE_STAGE, 3
    world.run_until_stable()
    assert world.stage(STAGE).state == "Running"


def test_attempt_without_a_job_is_restarted_after_the_start_timeout() -> None:
    """Its pods exist, but never run together, and nothing is known of their Job."""
    world = CoreWorld(spec=ONE_STAGE | {"restartPolicy": {"startTimeoutSeconds": 60}}, advances_time=False)
    pod = build_pod(STAGE, phase="Pending", is_ready=False, created=world.now)
    world.pods[pod.name] = pod
    world.run_until_stable()
    assert (world.stage(STAGE).state, world.stage(STAGE).attempt) == ("Starting", 1)
    world.now += 61
    world.run_until_stable()
    assert (world.stage(STAGE).state, world.stage(STAGE).attempt) == ("Running", 2)


def lose_job(world: CoreWorld) -> JobRecord:
    """Remove the labels of the run's Job: for the operator it is gone, but its pods still run."""
    [(name, job)] = world.jobs.items()
    world.jobs[name] = replace(job, is_gone=True, gone_at=world.now)
    return job


def test_attempt_whose_job_lost_its_labels_is_restarted_and_the_job_deleted() -> None:
    world = CoreWorld(spec=ONE_STAGE, advances_time=False)
    world.run_until_stable()
    job = lose_job(world)
    world.run_until_stable()
    assert world.stage(STAGE).attempt == 1, "the garbage collector may still delete the pods"
    world.now += LOST_JOB_SECONDS
    world.run_until_stable()
    stage = world.stage(STAGE)
    assert (stage.state, stage.attempt) == ("Running", 2)
    assert stage.last_failure is not None
    assert stage.last_failure.message == f"Job {job.name} is gone or lost its labels, but its pods still run"
    assert list(world.jobs) == ["demo-knowledge-2"]
    assert {pod.attempt for pod in world.pods.values()} == {2}


def test_run_whose_job_lost_its_labels_can_be_suspended() -> None:
    world = CoreWorld(spec=ONE_STAGE, advances_time=False)
    world.run_until_stable()
    lose_job(world)
    world.spec, world.generation = ONE_STAGE | {"suspend": True}, 2
    world.run_until_stable()
    assert world.stage(STAGE).state == "Suspended"


SECOND_ATTEMPT = {"stages": [{"name": STAGE, "state": "Running", "attempt": 2}]}


@pytest.mark.parametrize(
    ("status", "attempts"),
    [
        pytest.param({}, [1], id="no status yet"),
        pytest.param(SECOND_ATTEMPT, [1, 2], id="second attempt"),
        pytest.param({"stages": [{"name": STAGE, "state": "Running", "attempt": 7}]}, [6, 7], id="seventh attempt"),
        pytest.param({"stages": "none"}, [], id="status that cannot be read"),
    ],
)
def test_last_state_is_kept_of_the_newest_two_attempts(status, attempts):
    run = build_run(status=status, **ONE_STAGE)
    jobs = {n: build_job(STAGE, n) for n in range(12)}
    pods = {n: build_pod(STAGE, n, owner_uid=job.uid) for n, job in jobs.items()}
    assert [n for n, job in jobs.items() if is_job_evidence(run, plan(run), job)] == attempts
    assert [n for n, pod in pods.items() if is_pod_evidence(run, plan(run), [jobs[n]], pod)] == attempts


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, True, id="own"),
        pytest.param({"owner_uid": ""}, False, id="no owner"),
        pytest.param({"owner_uid": "other"}, False, id="of another Job"),
        pytest.param({"index": 2}, False, id="index that the plan lacks"),
        pytest.param({"stage": "other"}, False, id="stage that the plan lacks"),
    ],
)
def test_last_state_is_kept_of_pods_that_belong_to_the_plan(change, expected):
    run, job = build_run(status=SECOND_ATTEMPT, **ONE_STAGE), build_job(STAGE, 2, nodes=MAX_NODES)
    pod = replace(build_pod(STAGE, 2, owner_uid=job.uid), **change)
    assert is_pod_evidence(run, plan(run), [job], pod) is expected


def test_last_state_of_a_job_that_another_object_owns_is_not_kept():
    run = build_run(status=SECOND_ATTEMPT, **ONE_STAGE)
    assert not is_job_evidence(run, plan(run), build_job(STAGE, 2, owner_uid="other"))
