"""Why a worker ends: the rank that failed first, what its exception means, stalls, and what fits into the message."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import (
    Termination,
)
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
    pytest.param({0: fail(76), 2: fail(64, at=9, report=REPORTED)}, REPORTED, id="a final code before a lost peer"),
    pytest.param({0: fail(1), 2: fail(64, at=9, report=REPORTED)}, REPORTED, id="a final code before any other"),
    pytest.param(
        {0: fail(76), 1: fail(-11, at=9), 2: fail(-15)},
        Termination(exit_code=139, rank=1, message="rank 1 was ended by SIGSEGV; its stack is in the log"),
        id="a signal of its own before a lost peer and what the agent ended",
    ),
    pytest.param(
        {0: fail(1, at=5), 1: fail(1, at=4)},
        Termination(exit_code=1, rank=1, message="rank 1 ended with exit code 1 and left no words; see the log"),
        id="of equals the earliest",
    ),
    pytest.param(
        {0: fail(-15), 1: fail(76)},
        Termination(exit_code=76, rank=1, message="rank 1 ended with exit code 76 and left no words; see the log"),
        id="a lost peer before what the agent ended",
    ),
]


@pytest.mark.parametrize(("failures", "expected"), ROOT_CAUSES)
def test_the_rank_to_blame(failures: dict[int, ProcessFailure], expected: Termination) -> None:
    assert find_root_cause(failures) == expected


def test_a_kill_by_the_kernel_names_the_memory() -> None:
    failures = {1: fail(-9)}
    said = find_root_cause(failures, oom=MemoryUsage(peak_bytes=4 << 30, limit_bytes=4 << 30, oom_kills=1))
    assert (said.exit_code, said.rank) == (67, 1)
    assert said.message == (
        "rank 1 was killed by the kernel for want of memory: peak 4.0 GiB of 4.0 GiB; raise the workers' memory"
    )
    assert find_root_cause(failures) == Termination(exit_code=137, rank=1, message="rank 1 was ended by SIGKILL")


def test_a_signal_that_has_a_stack_shows_it(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("Fatal Python error: Bus error")
    said = find_root_cause({0: fail(-7)}, stacks=tmp_path)
    assert (said.exit_code, said.traceback) == (135, "Fatal Python error: Bus error")
    assert "SIGBUS; a volume that it had mapped is full or gone" in said.message
