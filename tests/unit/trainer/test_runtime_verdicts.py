"""Why a worker ends: the rank to blame, what its exception means, when it hangs, what fits into the message."""

from __future__ import annotations

from dataclasses import replace

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
from sailvl_trainer.runtime.blame import blame
from sailvl_trainer.runtime.diagnosis import describe
from sailvl_trainer.runtime.documents import decode, encode
from sailvl_trainer.runtime.errors import ConfigError, Preempted
from sailvl_trainer.runtime.termination import fit
from sailvl_trainer.runtime.watchdog import is_stalled


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
        Termination(exit_code=139, rank=1, message="rank 1 was ended by SIGSEGV"),
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
    assert blame(failures) == said


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
]


@pytest.mark.parametrize(("error", "code", "words"), ERRORS)
def test_what_an_exception_means(error: Exception, code: int, words: str) -> None:
    said = describe(error, rank=3)
    assert (said.exit_code, said.rank) == (code, 3)
    assert words in said.message
    assert type(error).__name__ in said.traceback


def test_a_stop_carries_its_checkpoint() -> None:
    saved = Checkpoint(step=4, path="demo/c")
    said = describe(Preempted("stopped", checkpoint=saved), rank=0)
    assert (said.exit_code, said.checkpoint) == (75, saved)


BEAT = Progress(attempt=1, phase="running", time=100.0)
STALLS = [
    pytest.param(BEAT, 50.0, 109.0, False, id="still in time"),
    pytest.param(BEAT, 50.0, 111.0, True, id="too late"),
    pytest.param(replace(BEAT, phase="stopping"), 50.0, 111.0, True, id="a stop may not hang either"),
    pytest.param(replace(BEAT, phase="starting"), 50.0, 999.0, False, id="starting takes its time"),
    pytest.param(replace(BEAT, phase="checkpointing"), 50.0, 999.0, False, id="saving does"),
    pytest.param(replace(BEAT, phase="evaluating"), 50.0, 999.0, False, id="evaluating does"),
    pytest.param(BEAT, 105.0, 999.0, False, id="the beat of ranks that are gone"),
    pytest.param(BEAT, None, 999.0, False, id="no ranks at present"),
    pytest.param(None, 50.0, 999.0, False, id="no beat as yet"),
]


@pytest.mark.parametrize(("progress", "since", "now", "stalled"), STALLS)
def test_when_a_worker_is_stalled(progress: Progress | None, since: float | None, now: float, stalled: bool) -> None:
    assert is_stalled(progress, since=since, now=now, stall_seconds=10) is stalled


@pytest.mark.parametrize("limit", [4096, 500])
def test_what_goes_first_is_the_traceback_then_the_message_then_metrics(limit: int) -> None:
    result = Result(
        stage="e", kind="evaluate", digest="d", attempt=1, output="o", metrics={f"m{i}": 1.0 for i in range(20)}
    )
    whole = Termination(exit_code=1, message="m" * 3000, traceback="first\n" * 2000 + "last", result=result)
    data = fit(whole, limit)
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
    said = decode(Termination, fit(Termination(exit_code=65, message="no file \udcff.jpg")))
    assert said.message == "no file ?.jpg"
