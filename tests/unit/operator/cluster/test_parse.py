"""Parsing of Jobs and pods to records, and the times that their earlier state adds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sailvl_operator.api import names
from sailvl_operator.cluster.parse import (
    _share_uid,
    is_routine_job,
    is_routine_pod,
    parse_job,
    parse_pod,
    parse_service,
    stamp_pod,
)
from sailvl_operator.core.observe import PodRecord
from tests.support.builders.operator import build_end, build_job, build_pod

CREATED = "2026-01-01T00:00:00Z"


def raw(labels: dict[str, str], **status: Any) -> dict[str, Any]:
    metadata = {"namespace": "team", "name": "x", "uid": "u", "labels": labels, "creationTimestamp": CREATED}
    return {"metadata": metadata, "spec": {}, "status": status}


@pytest.mark.parametrize("number", ["x", "-1", "", "1.5"])
def test_labels_with_any_value_are_parsed(number: str) -> None:
    labels = {names.LABEL_RUN: "demo", names.LABEL_ATTEMPT: number, names.LABEL_COMPLETION_INDEX: number}
    assert (parse_pod(raw(labels)).attempt, parse_pod(raw(labels)).index, parse_job(raw(labels)).attempt) == (0, 0, 0)


def test_queued_job_has_not_started() -> None:
    """The Job controller writes the start time some time after the admission."""
    queued = {names.LABEL_KUEUE_QUEUE: "team"}
    assert parse_job(raw(queued)).started == 0.0
    assert parse_job(raw(queued, startTime="2026-01-01T00:15:00Z")).started == 1767226500.0
    assert parse_job(raw({})).started == 1767225600.0


def test_temporary_silence_of_a_node_is_not_an_end() -> None:
    silent = stamp_pod(build_pod("a", is_ready=False), build_pod("a"), 5.0)
    assert silent.ended_seen == 5.0
    assert stamp_pod(replace(silent, ended_seen=0.0), silent, 6.0).ended_seen == 5.0
    gone = replace(silent, ended_seen=0.0, is_gone=True)
    assert stamp_pod(gone, silent, 6.5).ended_seen == 6.5
    assert stamp_pod(replace(gone, terminated=build_end(0)), replace(gone, ended_seen=6.5), 6.6).ended_seen == 6.5
    back = stamp_pod(build_pod("a"), silent, 7.0)
    assert back.ended_seen == 0.0
    ended = build_pod("a", is_ready=False, terminated=build_end(76))
    assert stamp_pod(ended, back, 9.0).ended_seen == 9.0


def test_running_container_has_no_waiting_reason() -> None:
    waiting = build_pod("a", phase="Pending", is_ready=False, waiting_reason="CreateContainerConfigError")
    stamped = stamp_pod(waiting, None, 5.0)
    assert stamped.ended_seen == 5.0
    creating = build_pod("a", phase="Pending", is_ready=False, waiting_reason="ContainerCreating")
    assert stamp_pod(creating, stamped, 6.0).ended_seen == 0.0


@pytest.mark.parametrize(
    ("pod", "is_routine"),
    [
        pytest.param(build_pod("a"), True, id="running"),
        pytest.param(build_pod("a", phase="Pending", is_ready=False), True, id="pending"),
        pytest.param(build_pod("a", phase="Pending", waiting_reason="ContainerCreating"), True, id="creating"),
        pytest.param(build_pod("a", is_ready=False, ended_seen=5.0), False, id="silent node"),
        pytest.param(build_pod("a", terminated=build_end(0)), False, id="terminated"),
        pytest.param(build_pod("a", is_deleting=True), False, id="being deleted"),
        pytest.param(build_pod("a", is_gone=True), False, id="deleted"),
        pytest.param(build_pod("a", disrupted="TerminationByKubelet"), False, id="evicted"),
        pytest.param(build_pod("a", unschedulable="0/2 nodes are available"), False, id="unschedulable"),
        pytest.param(build_pod("a", waiting_reason="ImagePullBackOff"), False, id="image pull fails"),
    ],
)
def test_pods_that_need_no_action_are_routine(pod: PodRecord, is_routine: bool) -> None:
    assert is_routine_pod(pod) is is_routine


def test_job_that_was_just_admitted_has_not_started() -> None:
    job = raw({names.LABEL_RUN: "demo"}, conditions=[{"type": "Suspended", "status": "True"}])
    assert parse_job(job).started == 0.0
    job["status"] = {"conditions": [{"type": "Suspended", "status": "False"}], "startTime": CREATED}
    assert parse_job(job).started == parse_job(job).created
    job["status"] = {}
    assert parse_job(job).started == parse_job(job).created, "never suspended: the controller hasn't seen it yet"


@pytest.mark.parametrize(
    ("fields", "is_routine"),
    [
        pytest.param({}, True, id="created"),
        pytest.param({"is_suspended": True}, False, id="suspended"),
        pytest.param({"queue": "team"}, False, id="queued"),
        pytest.param({"is_deleting": True}, False, id="being deleted"),
    ],
)
def test_jobs_that_need_no_action_are_routine(fields: dict[str, Any], is_routine: bool) -> None:
    assert is_routine_job(build_job("a", **fields)) is is_routine


def test_pod_of_the_network_of_its_node_has_no_address_of_its_own() -> None:
    pod = raw({names.LABEL_RUN: "demo"}, podIP="10.0.0.1")
    assert parse_pod(pod).ip == "10.0.0.1"
    pod["spec"]["hostNetwork"] = True
    assert parse_pod(pod).ip == ""


def test_messages_of_a_pod_are_clean_lines_of_bounded_length() -> None:
    message = "no\x1b[2J\nroom\u202e" + "x" * 5000
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "Evicted", "message": message}
    unscheduled = {"type": "PodScheduled", "status": "False", "message": message}
    waiting = {"name": names.CONTAINER, "state": {"waiting": {"reason": "ErrImagePull", "message": message}}}
    pod = parse_pod(raw({}, conditions=[disrupted, unscheduled], containerStatuses=[waiting]))
    cleaned = ("no[2J room" + "x" * 5000)[:1000]
    assert (pod.unschedulable, pod.waiting_message) == (cleaned, cleaned)
    assert pod.disrupted == f"Evicted: {cleaned}"[:1000]


def test_long_numbers_of_labels_are_cut() -> None:
    labels = {names.LABEL_RUN: "demo", names.LABEL_ATTEMPT: "9" * 63, names.LABEL_COMPLETION_INDEX: "9" * 63}
    assert max(parse_pod(raw(labels)).attempt, parse_pod(raw(labels)).index) < 2**63


def test_uids_of_owners_are_shared_within_bounds() -> None:
    def parse(uid: str) -> str:
        owner = {"kind": "SailVLRun", "name": "demo", "uid": uid, "controller": True}
        metadata = {"namespace": "team", "name": "s", "uid": "s", "labels": {names.LABEL_RUN: "demo"}}
        return parse_service({"metadata": metadata | {"ownerReferences": [owner]}}).owner_uid

    assert parse("".join(["u", "1"])) is parse("".join(["u", "1"]))
    assert parse("u" * 65) == "", "no owner has such a UID, but a record would hold its megabytes"
    for number in range(5_000):
        parse(f"u{number}")
    assert _share_uid.cache_info().currsize <= 4096


def test_record_of_a_pod_stays_small_whatever_its_texts() -> None:
    """A user may fill most fields of a pod up to the limit of the API server; the names and labels are short."""
    text = "x" * 100_000
    condition = {"status": "False", "reason": text, "message": text}
    waiting = {"name": names.CONTAINER, "state": {"waiting": {"reason": text, "message": text}}}
    ended = {"name": names.CONTAINER, "state": {"terminated": {"exitCode": 1, "reason": text, "message": text}}}
    for status in (waiting, ended):
        pod = raw({names.LABEL_RUN: "demo"}, containerStatuses=[status, *[{"name": "y"}] * 1000])
        pod["status"]["conditions"] = [condition | {"type": t} for t in ("PodScheduled", "DisruptionTarget")]
        pod["spec"]["schedulerName"] = text
        pod["metadata"]["ownerReferences"] = [{"kind": text, "name": text, "uid": text, "controller": True}]
        assert len(msgspec.json.encode(parse_pod(pod))) < 16 * 1024
