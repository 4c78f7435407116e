"""SIGTERM: which work is lost if ranks don't stop in time, and when there is none to lose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sailvl_trainer.contract import Checkpoint, Progress
from sailvl_trainer.worker.signals import describe_grace_timeout, is_starting

BEAT = Progress(attempt=1, phase="running", time=100.0)
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
