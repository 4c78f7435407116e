"""If several ranks failed, the one whose failure made the others fail is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import Termination
from sailvl_trainer.rank.cgroup import MemoryUsage
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.worker.root_cause import find_root_cause


def fail(code: int, *, at: int = 0, report: Termination | None = None) -> ProcessFailure:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="/nowhere")
    failure.timestamp = at
    if report is not None:
        failure.message = encode(report).decode()
    return failure


REPORTED = Termination(exit_code=64, rank=2, message="set less")
ROOT_CAUSES = [
    pytest.param({0: fail(76), 2: fail(64, at=9, report=REPORTED)}, REPORTED, id="non-retryable code before lost peer"),
    pytest.param(
        {0: fail(1), 2: fail(64, at=9, report=REPORTED)}, REPORTED, id="non-retryable code before any other code"
    ),
    pytest.param(
        {0: fail(76), 1: fail(-11, at=9), 2: fail(-15)},
        Termination(exit_code=139, rank=1, message="rank 1 was killed by SIGSEGV; its stack is in the log"),
        id="own signal before lost peer and SIGTERM of the agent",
    ),
    pytest.param(
        {0: fail(1, at=5), 1: fail(1, at=4)},
        Termination(exit_code=1, rank=1, message="rank 1 exited with code 1 and no error report; see the log"),
        id="earliest of equals",
    ),
    pytest.param(
        {0: fail(-15), 1: fail(76)},
        Termination(exit_code=76, rank=1, message="rank 1 exited with code 76 and no error report; see the log"),
        id="lost peer before SIGTERM of the agent",
    ),
]


@pytest.mark.parametrize(("failures", "expected"), ROOT_CAUSES)
def test_root_cause_is_the_failure_with_the_highest_precedence(
    failures: dict[int, ProcessFailure], expected: Termination
) -> None:
    assert find_root_cause(failures) == expected


def test_oom_kill_names_peak_and_limit() -> None:
    failures = {1: fail(-9)}
    found = find_root_cause(failures, oom=MemoryUsage(peak_bytes=4 << 30, limit_bytes=4 << 30, oom_kills=1))
    assert (found.exit_code, found.rank) == (67, 1)
    assert found.message == "rank 1 was OOM-killed: peak 4.0 GiB of 4.0 GiB; raise the workers' memory limit"
    assert find_root_cause(failures) == Termination(exit_code=137, rank=1, message="rank 1 was killed by SIGKILL")


def test_signal_is_reported_with_its_stack(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("Fatal Python error: Bus error")
    found = find_root_cause({0: fail(-7)}, stacks_dir=tmp_path)
    assert (found.exit_code, found.traceback) == (135, "Fatal Python error: Bus error")
    assert "SIGBUS; a memory-mapped file is on a full or missing volume" in found.message
