"""SIGTERM: which work is lost if ranks don't stop in time, and when there is none to lose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sailvl_trainer.contract import Checkpoint, Progress
from sailvl_trainer.worker.exit import describe_grace_timeout, is_starting

HEARTBEAT = Progress(attempt=1, phase="running", time=100.0)
SAVED = Checkpoint(step=7, path="c")
STEPS = Progress(attempt=1, phase="checkpointing", step=9, checkpoint=SAVED)
GRACE_TIMEOUTS = [
    pytest.param(STEPS, 143, "2 steps since the last one are lost", SAVED, id="steps since the checkpoint"),
    pytest.param(replace(STEPS, checkpoint=None), 143, "9 steps", None, id="no checkpoint"),
    pytest.param(replace(STEPS, step=7), 75, "no step is lost", SAVED, id="all steps saved"),
    pytest.param(replace(STEPS, step=0, checkpoint=None), 75, "no step is lost", None, id="before the first step"),
    pytest.param(replace(STEPS, unit="samples"), 75, "completed work is saved", None, id="curating"),
    pytest.param(replace(STEPS, unit="questions"), 75, "completed work is saved", None, id="evaluating"),
    pytest.param(None, 75, "completed work is saved", None, id="no progress document"),
]


@pytest.mark.parametrize(("progress", "code", "message", "saved"), GRACE_TIMEOUTS)
def test_grace_timeout_reports_lost_steps(
    progress: Progress | None, code: int, message: str, saved: Checkpoint | None
) -> None:
    ended = describe_grace_timeout(progress, 30)
    assert (ended.exit_code, ended.checkpoint) == (code, saved)
    assert "within 30 s of SIGTERM" in ended.message
    assert message in ended.message


STARTING = [
    pytest.param(None, None, True, id="no ranks yet"),
    pytest.param(HEARTBEAT, None, True, id="restarting in place"),
    pytest.param(HEARTBEAT, 105.0, True, id="progress of the ranks before a restart"),
    pytest.param(replace(HEARTBEAT, phase="starting"), 50.0, True, id="loading"),
    pytest.param(HEARTBEAT, 50.0, False, id="running"),
]


@pytest.mark.parametrize(("progress", "started_at", "expected"), STARTING)
def test_ranks_are_starting_until_their_first_heartbeat_at_work(
    progress: Progress | None, started_at: float | None, expected: bool
) -> None:
    assert is_starting(progress, started_at) is expected
