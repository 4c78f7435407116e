"""The watchdog finds ranks without progress and reports their stacks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Progress
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.worker.ranks import Ranks
from sailvl_trainer.worker.watchdog import describe_stall, find_exceeded_timeout, find_stalled_rank

BEAT = Progress(attempt=1, phase="running", time=100.0)
STALLS = [
    pytest.param(BEAT, 50.0, 109.0, 0, id="still in time"),
    pytest.param(BEAT, 50.0, 111.0, 10, id="too late"),
    pytest.param(replace(BEAT, phase="stopping"), 50.0, 111.0, 10, id="a stop may not hang either"),
    pytest.param(replace(BEAT, phase="starting"), 50.0, 199.0, 0, id="starting takes its time"),
    pytest.param(replace(BEAT, phase="checkpointing"), 50.0, 199.0, 0, id="saving does"),
    pytest.param(replace(BEAT, phase="evaluating"), 50.0, 199.0, 0, id="evaluating does"),
    pytest.param(replace(BEAT, phase="checkpointing"), 50.0, 201.0, 100, id="but not for ever"),
    pytest.param(BEAT, 105.0, 204.0, 0, id="the beat of ranks that are gone; theirs may take long to come"),
    pytest.param(BEAT, 105.0, 206.0, 100, id="but not for ever either"),
    pytest.param(None, 50.0, 149.0, 0, id="no beat as yet"),
    pytest.param(None, 50.0, 151.0, 100, id="a rank that never said a word"),
]


@pytest.mark.parametrize(("progress", "since", "now", "limit"), STALLS)
def test_when_a_rank_is_stalled(progress: Progress | None, since: float, now: float, limit: int) -> None:
    assert find_exceeded_timeout(progress, since=since, now=now, stall_timeout_seconds=10) == limit


def beat(scratch: Scratch, *progress: Progress) -> None:
    for local_rank, document in enumerate(progress):
        write_atomic(scratch.progress_path(local_rank), encode(document))


def test_every_rank_is_watched(tmp_path: Path) -> None:
    """A rank that waits for its neighbours may go on beating."""
    ranks, scratch = Ranks(), Scratch(tmp_path)
    assert find_stalled_rank(ranks, scratch, now=1e12, stall_timeout_seconds=10) is None
    ranks.begin([1, 2])
    now = time.time() + 1000
    well = replace(BEAT, time=now)
    beat(scratch, well, well)
    assert find_stalled_rank(ranks, scratch, now=now, stall_timeout_seconds=10) is None
    beat(scratch, well, replace(BEAT, time=now - 11, step=7))
    assert (
        find_stalled_rank(ranks, scratch, now=now, stall_timeout_seconds=10)
        == "no progress for 10 s (running, after step 7)"
    )


def test_the_rarest_stack_is_the_one_that_is_not_cut() -> None:
    waiting, lost = '  File "distributed.py", line 5 in wait', '  File "odd.py", line 1 in think'
    stacks = [f"local rank {i}:\nThread {i * 7}\n{lost if i == 1 else waiting}" for i in range(4)]
    said = describe_stall("no progress", stacks)
    assert said.message == "no progress; stacks are in the log of every worker"
    assert (said.exit_code, said.traceback) == (68, "\n".join(stacks[i] for i in (0, 2, 3, 1)))
