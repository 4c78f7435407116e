"""Why a worker ends: the rank that failed first, what its exception means, stalls, and what fits into the message."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sailvl_trainer.contract import (
    Checkpoint,
    Progress,
    Result,
    Termination,
)
from sailvl_trainer.errors import ConfigError, Preempted, StorageError
from sailvl_trainer.rank.cgroup import Memory
from sailvl_trainer.rank.exceptions import build_termination
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.termination import encode_termination
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.worker.ranks import Ranks
from sailvl_trainer.worker.root_cause import find_root_cause
from sailvl_trainer.worker.signals import describe_grace_timeout, is_starting
from sailvl_trainer.worker.watchdog import describe_stall, find_exceeded_timeout, find_stalled_rank


def fail(code: int, *, at: int = 0, words: Termination | None = None) -> ProcessFailure:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="/nowhere")
    failure.timestamp = at
    if words is not None:
        failure.message = encode(words).decode()
    return failure


SAID = Termination(exit_code=64, rank=2, message="set less")
BLAME = [
    pytest.param({0: fail(76), 2: fail(64, at=9, words=SAID)}, SAID, id="a final code before a lost peer"),
    pytest.param({0: fail(1), 2: fail(64, at=9, words=SAID)}, SAID, id="a final code before any other"),
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


@pytest.mark.parametrize(("failures", "said"), BLAME)
def test_the_rank_to_blame(failures: dict[int, ProcessFailure], said: Termination) -> None:
    assert find_root_cause(failures) == said


def test_a_kill_by_the_kernel_names_the_memory() -> None:
    failures = {1: fail(-9)}
    said = find_root_cause(failures, oom=Memory(peak=4 << 30, limit=4 << 30, kills=1))
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


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GLOO = "[gloo/transport/tcp/pair.cc:543] Connection closed by peer [10.0.0.3]:4242"
ERRORS = [
    pytest.param(ConfigError("set less"), 64, "set less", id="our own"),
    pytest.param(ValueError("odd"), 1, "ValueError: odd", id="anything"),
    pytest.param(RuntimeError(GLOO), 76, "another rank is gone", id="gloo's neighbour closed"),
    pytest.param(raised_from(KeyError("x"), RuntimeError(GLOO)), 76, "another rank is gone", id="wrapped"),
    pytest.param(dist.DistBackendError("ncclRemoteError"), 76, "another rank is gone", id="nccl's neighbour"),
    pytest.param(dist.DistBackendError("ncclInvalidUsage: Duplicate GPU"), 1, "Duplicate GPU", id="our own nccl fault"),
    pytest.param(ConnectionResetError("Connection reset by peer"), 1, "ConnectionResetError", id="some other server"),
    pytest.param(torch.OutOfMemoryError("tried 2 GiB"), 67, "lower packTokens", id="the accelerator is full"),
    pytest.param(MemoryError(), 67, "raise the workers' memory limit", id="the machine is full"),
    pytest.param(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        67,
        "raise the workers' memory limit",
        id="torch on a full machine",
    ),
    pytest.param(StorageError("make room"), 74, "make room", id="the storage is full"),
]


@pytest.mark.parametrize(("error", "code", "words"), ERRORS)
def test_what_an_exception_means(error: Exception, code: int, words: str) -> None:
    said = build_termination(error, rank=3)
    assert (said.exit_code, said.rank) == (code, 3)
    assert words in said.message
    assert type(error).__name__ in said.traceback


def test_a_stop_carries_its_checkpoint() -> None:
    saved = Checkpoint(step=4, path="demo/c")
    said = build_termination(Preempted("stopped", checkpoint=saved), rank=0)
    assert (said.exit_code, said.checkpoint) == (75, saved)


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


SAVED = Checkpoint(step=7, path="c")
STEPS = Progress(attempt=1, phase="checkpointing", step=9, checkpoint=SAVED)
GRACES = [
    pytest.param(STEPS, 143, "the 2 steps since the last one are lost", SAVED, id="steps since the checkpoint"),
    pytest.param(replace(STEPS, checkpoint=None), 143, "the 9 steps", None, id="no checkpoint"),
    pytest.param(replace(STEPS, step=7), 75, "no step is lost", SAVED, id="exporting, all saved"),
    pytest.param(replace(STEPS, step=0, checkpoint=None), 75, "no step is lost", None, id="before the first step"),
    pytest.param(replace(STEPS, unit="samples"), 75, "what is done stays done", None, id="curating"),
    pytest.param(replace(STEPS, unit="questions"), 75, "what is done stays done", None, id="evaluating"),
    pytest.param(None, 75, "what is done stays done", None, id="nothing known"),
]


@pytest.mark.parametrize(("progress", "code", "words", "saved"), GRACES)
def test_what_is_lost_at_the_end_of_the_grace(
    progress: Progress | None, code: int, words: str, saved: Checkpoint | None
) -> None:
    said = describe_grace_timeout(progress, 30)
    assert (said.exit_code, said.checkpoint) == (code, saved)
    assert "within 30 s of SIGTERM" in said.message
    assert words in said.message


STARTS = [
    pytest.param(None, None, True, id="no ranks yet"),
    pytest.param(BEAT, None, True, id="being started again"),
    pytest.param(BEAT, 105.0, True, id="the words are those of ranks that are gone"),
    pytest.param(replace(BEAT, phase="starting"), 50.0, True, id="loading"),
    pytest.param(BEAT, 50.0, False, id="at work"),
]


@pytest.mark.parametrize(("progress", "since", "expected"), STARTS)
def test_whether_there_is_nothing_to_lose_yet(progress: Progress | None, since: float | None, expected: bool) -> None:
    assert is_starting(progress, since) is expected


@pytest.mark.parametrize("limit", [4096, 560])
def test_what_goes_first_is_the_traceback_then_the_message_then_metrics(limit: int) -> None:
    result = Result(
        stage="e", kind="evaluate", digest="d", attempt=1, output="o", metrics={f"m{i}": 1.0 for i in range(20)}
    )
    whole = Termination(exit_code=1, message="m" * 3000, traceback="first\n" * 2000 + "last", result=result)
    data = encode_termination(whole, limit)
    assert len(data) <= limit
    said = decode(Termination, data)
    assert said.result is not None
    if limit == 4096:
        assert said.traceback.endswith("last")
        assert (said.message, said.result) == (whole.message, result)
    else:
        assert (said.traceback, len(said.message)) == ("", 200)
        assert 0 < len(said.result.metrics) < 20


def test_half_a_surrogate_pair_is_no_reason_to_say_nothing() -> None:
    said = decode(Termination, encode_termination(Termination(exit_code=65, message="no file \udcff.jpg")))
    assert said.message == "no file ?.jpg"
