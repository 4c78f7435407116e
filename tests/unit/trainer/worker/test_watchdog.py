"""The watchdog finds ranks without progress and reports their stacks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Progress
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.worker.ranks import RankProcesses
from sailvl_trainer.worker.watchdog import describe_stall, find_exceeded_timeout, find_stalled_rank

HEARTBEAT = Progress(attempt=1, phase="running", time=100.0)
STALLS = [
    pytest.param(HEARTBEAT, 50.0, 109.0, 0, id="within the timeout"),
    pytest.param(HEARTBEAT, 50.0, 111.0, 10, id="timeout exceeded"),
    pytest.param(replace(HEARTBEAT, phase="stopping"), 50.0, 111.0, 10, id="stopping"),
    pytest.param(replace(HEARTBEAT, phase="starting"), 50.0, 199.0, 0, id="starting is slow"),
    pytest.param(replace(HEARTBEAT, phase="checkpointing"), 50.0, 199.0, 0, id="checkpointing is slow"),
    pytest.param(replace(HEARTBEAT, phase="evaluating"), 50.0, 199.0, 0, id="evaluating is slow"),
    pytest.param(replace(HEARTBEAT, phase="checkpointing"), 50.0, 201.0, 100, id="slow phase exceeds its timeout"),
    pytest.param(HEARTBEAT, 105.0, 204.0, 0, id="heartbeat from before a restart"),
    pytest.param(HEARTBEAT, 105.0, 206.0, 100, id="no heartbeat since a restart"),
    pytest.param(None, 50.0, 149.0, 0, id="no heartbeat yet"),
    pytest.param(None, 50.0, 151.0, 100, id="never a heartbeat"),
]


@pytest.mark.parametrize(("progress", "started_at", "now", "limit"), STALLS)
def test_timeout_depends_on_phase_and_restart(
    progress: Progress | None, started_at: float, now: float, limit: int
) -> None:
    assert find_exceeded_timeout(progress, started_at=started_at, now=now, stall_seconds=10) == limit


def write_heartbeats(scratch: Scratch, *progress: Progress) -> None:
    for local_rank, document in enumerate(progress):
        write_atomic(scratch.progress_path(local_rank), encode(document))


def test_every_rank_is_watched(tmp_path: Path) -> None:
    """The first rank may send heartbeats while another one is stalled."""
    ranks, scratch = RankProcesses(), Scratch(tmp_path)
    assert find_stalled_rank(ranks, scratch, now=1e12, stall_seconds=10) is None
    ranks.set_running([1, 2])
    now = time.time() + 1000
    on_time = replace(HEARTBEAT, time=now)
    write_heartbeats(scratch, on_time, on_time)
    assert find_stalled_rank(ranks, scratch, now=now, stall_seconds=10) is None
    write_heartbeats(scratch, on_time, replace(HEARTBEAT, time=now - 11, step=7))
    assert (
        find_stalled_rank(ranks, scratch, now=now, stall_seconds=10) == "no progress for 10 s (running, after step 7)"
    )


def test_rarest_stack_comes_last() -> None:
    common, rare = '  File "distributed.py", line 5 in wait', '  File "odd.py", line 1 in sleep'
    stacks = [f"local rank {i}:\nThread {i * 7}\n{rare if i == 1 else common}" for i in range(4)]
    stall = describe_stall("no progress", stacks)
    assert stall.message == "no progress; stacks are in the log of every worker"
    assert (stall.exit_code, stall.traceback) == (68, "\n".join(stacks[i] for i in (0, 2, 3, 1)))
