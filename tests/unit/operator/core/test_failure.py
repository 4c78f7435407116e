"""Tests of evidence and failure: the cause of a failed attempt from the evidence of all its pods."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import Cause
from sailvl_operator.core.evidence import GRACE_SLACK_SECONDS, collect_evidence
from sailvl_operator.core.failure import find_root_cause, is_node_suspect
from sailvl_operator.core.observe import PodRecord, Terminated
from sailvl_trainer.contract import ExitCode
from tests.support.builders.operator import build_end, build_pod

NO_SUCH_COMMAND = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "
    'unable to start container process: exec: "/no/such/command": stat /no/such/command: no such file or directory: '
    "unknown"
)
"""Error of containerd, verbatim."""
BROKEN_DRIVER = (
    "failed to create task: error running prestart hook: nvidia-container-cli: initialization error: "
    "load library failed: "
    "libnvidia-ml.so.1: cannot open shared object file: no such file or directory"
)
CASES = [
    pytest.param([build_end(64), build_end(76)], Cause.CONFIG, 0, id="a bad setting"),
    pytest.param([build_end(76), build_end(65)], Cause.DATA, 1, id="a bad record on the second worker"),
    pytest.param([build_end(66), build_end(66)], Cause.NON_FINITE, 0, id="non-finite loss on all workers"),
    pytest.param([build_end(67), build_end(76)], Cause.OUT_OF_MEMORY, 0, id="GPU memory"),
    pytest.param(
        [Terminated(exit_code=137, reason="OOMKilled"), build_end(76)], Cause.OUT_OF_MEMORY, 0, id="host memory"
    ),
    pytest.param([build_end(76), build_end(137)], Cause.CRASH, 1, id="a killed rank ends its peer"),
    pytest.param([build_end(1, at=5), build_end(1, at=3)], Cause.CRASH, 1, id="of two crashes the earlier counts"),
    pytest.param([build_end(76), build_end(76)], Cause.INFRA, 0, id="only lost peers"),
    pytest.param([build_end(68), build_end(143)], Cause.STALLED, 0, id="stall"),
    pytest.param([build_end(75), build_end(76)], Cause.PREEMPTED, 0, id="a saved checkpoint after SIGTERM"),
    pytest.param([build_end(127)], Cause.CONFIG, 0, id="command missing in the image"),
    pytest.param(
        [Terminated(exit_code=128, reason="StartError", message=NO_SUCH_COMMAND)],
        Cause.CONFIG,
        0,
        id="command missing, as containerd reports it",
    ),
    pytest.param(
        [Terminated(exit_code=128, reason="StartError", message=BROKEN_DRIVER)],
        Cause.CRASH,
        0,
        id="node that can't start containers",
    ),
]


@pytest.mark.parametrize(("ends", "cause", "index"), CASES)
def test_exit_codes_determine_the_cause(ends: list[Terminated], cause: Cause, index: int) -> None:
    pods = [
        build_pod("alignment", index=i, phase="Failed", is_ready=False, terminated=end) for i, end in enumerate(ends)
    ]
    root_cause = find_root_cause(collect_evidence(pods, was_running=True))
    assert (root_cause.cause, root_cause.pod.index) == (cause, index)


SUSPECTS = [
    pytest.param([build_end(76), build_end(76)], False, id="only lost peers"),
    pytest.param([build_end(76), build_end(139)], True, id="a crash below the program"),
    pytest.param([build_end(1, message="RuntimeError: CUDA error: uncorrectable ECC error")], True, id="a broken GPU"),
    pytest.param([build_end(1, message="KeyError: 'loss'")], False, id="error of the program"),
    pytest.param([build_end(74, message="/data: No space left on device")], False, id="a full volume"),
    pytest.param([build_end(68), build_end(76)], True, id="one stalled worker"),
    pytest.param([build_end(68, ranks_started=False)], False, id="stall before the ranks started"),
    pytest.param([Terminated(exit_code=128, reason="StartError", message=BROKEN_DRIVER)], True, id="a broken driver"),
    pytest.param([build_end(68), build_end(68)], False, id="stall on all workers"),
    pytest.param([build_end(64)], False, id="a bad setting"),
]


@pytest.mark.parametrize(("ends", "is_suspect"), SUSPECTS)
def test_node_is_suspected_only_without_an_error_of_the_program(ends: list[Terminated], is_suspect: bool) -> None:
    pods = [build_pod("a", index=i, phase="Failed", is_ready=False, terminated=end) for i, end in enumerate(ends)]
    evidence = collect_evidence(pods, was_running=True)
    assert is_node_suspect(find_root_cause(evidence), evidence) is is_suspect


PODS = [
    pytest.param(build_pod("a", is_gone=True), Cause.INFRA, id="deleted externally"),
    pytest.param(build_pod("a", disrupted="DeletionByTaintManager: x"), Cause.INFRA, id="evicted"),
    pytest.param(build_pod("a", is_ready=False), Cause.INFRA, id="running but not ready: the node is lost"),
    pytest.param(
        build_pod("a", phase="Pending", is_ready=False, waiting_reason="InvalidImageName"), Cause.CONFIG, id="image"
    ),
    pytest.param(
        build_pod("a", is_gone=True, terminated=build_end(75)), Cause.PREEMPTED, id="deleted after saving a checkpoint"
    ),
    pytest.param(build_pod("a", is_gone=True, terminated=build_end(137)), Cause.INFRA, id="deleted and killed"),
    pytest.param(
        build_pod("a", is_gone=True, terminated=build_end(65)), Cause.DATA, id="deleted, with a final exit code"
    ),
]


@pytest.mark.parametrize(("pod", "cause"), PODS)
def test_pod_state_determines_the_cause(pod: PodRecord, cause: Cause) -> None:
    assert find_root_cause(collect_evidence([pod], was_running=True)).cause == cause


def test_evicted_pod_has_its_grace_period() -> None:
    """A pod on a living node may still save a checkpoint; a pod on a dead node can't."""
    evicted = build_pod("a", disrupted="EvictionByEvictionAPI: x", is_deleting=True, ended_seen=100.0, delete_by=220.0)
    (saving,) = collect_evidence([evicted], was_running=True)
    assert saving.seen + saving.min_seconds == 220.0 + GRACE_SLACK_SECONDS
    for pod in (
        replace(evicted, is_ready=False),
        replace(evicted, terminated=build_end(75)),
        replace(evicted, is_gone=True),
    ):
        assert collect_evidence([pod], was_running=True)[0].min_seconds == 0.0


def test_starting_pod_is_no_evidence() -> None:
    pod = build_pod("a", is_ready=False)
    assert collect_evidence([pod], was_running=False) == []


def test_deleted_duplicate_pod_is_no_evidence() -> None:
    second, ended = build_pod("a", uid="second"), build_end(ExitCode.PEER_LOST)
    for first in (build_pod("a", is_gone=True), build_pod("a", is_deleting=True, terminated=ended)):
        assert collect_evidence([first, second], was_running=True) == []
        assert collect_evidence([first, replace(second, is_gone=True)], was_running=True)
        assert collect_evidence([first, replace(second, index=1)], was_running=True)


def test_evidence_has_rank_and_message_of_the_worker() -> None:
    end = build_end(1, rank=3, message="RuntimeError: boom")
    (evidence,) = collect_evidence([build_pod("a", terminated=end)], was_running=True)
    assert (evidence.rank, evidence.message, evidence.exit_code) == (3, "RuntimeError: boom", 1)


def test_truncated_termination_message_is_shown_as_log() -> None:
    end = Terminated(exit_code=1, message='{"exit_code": 1, "mess')
    (evidence,) = collect_evidence([build_pod("a", terminated=end)], was_running=True)
    assert evidence.message == 'exit code 1; last log line: {"exit_code": 1, "mess'
    assert evidence.traceback == end.message


def test_killed_worker_shows_signal_and_last_log_line() -> None:
    end = Terminated(exit_code=137, message="step 7 of 64\nrank 1 INFO generated new fontManager\n")
    (evidence,) = collect_evidence([build_pod("a", terminated=end)], was_running=True)
    said = "terminated by SIGKILL (exit code 137); last log line: rank 1 INFO generated new fontManager"
    assert (evidence.cause, evidence.message) == (Cause.CRASH, said)
    assert evidence.traceback == end.message.strip()


@pytest.mark.parametrize(
    ("code", "message"), [(137, "terminated by SIGKILL (exit code 137)"), (3, "exit code 3"), (255, "exit code 255")]
)
def test_worker_without_message_is_described_by_its_exit_code(code: int, message: str) -> None:
    (evidence,) = collect_evidence([build_pod("a", terminated=Terminated(exit_code=code))], was_running=True)
    assert evidence.message == message
