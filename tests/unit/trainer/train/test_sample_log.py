"""The sample log follows the lineage of attempts, and counts repeated steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sailvl_trainer.contract import Checkpoint, Lineage
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.train.sample_log import (
    SampleLog,
    count_lost_steps,
    read_skipped_samples,
    read_trained_samples,
    sample_log_path,
)
from tests.support.builders.training import build_stage


def test_sample_log_follows_the_lineage_of_attempts(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    starts = {1: None, 2: Checkpoint(step=2, path=files.relative_path(files.checkpoint_dir(1, 2)))}
    for attempt, start in starts.items():
        write_atomic(files.attempts / f"{attempt}.json", encode(Lineage(attempt=attempt, start=start)))
    first = SampleLog(files, 1)
    for step in (1, 2, 3):
        first.write(step, (step, 10 + step))
    with sample_log_path(files, 1).open("a") as torn:
        torn.write('{"step": 4, "sam')
    SampleLog(files, 1).write(3, (30,))
    assert read_trained_samples(files, last_attempt=1) == {1: [1, 11], 2: [2, 12], 3: [30]}
    assert count_lost_steps(files, 2, start=2) == 2, "step 3, twice"
    second = SampleLog(files, 2)
    second.write(3, (99,), is_skipped=True)
    second.write(4, (98,))
    assert read_trained_samples(files, last_attempt=2) == {1: [1, 11], 2: [2, 12], 4: [98]}
    assert read_skipped_samples(files, last_attempt=2) == {3: [99]}
    assert count_lost_steps(files, 3, start=4) == 2
    assert count_lost_steps(files, 3, start=0) == 6
    claim_stage(files, 3)
    assert read_trained_samples(files, last_attempt=3).keys() == {1, 2, 4}, (
        "an attempt that never started discards nothing"
    )


UNREADABLE = [
    pytest.param(b"[" * 100_000, id="nested too deeply"),
    pytest.param(b"[1]", id="no object"),
    pytest.param(b"{}", id="no step"),
    pytest.param(b'{"step":1,"samples":["x"]}', id="samples of another type"),
    pytest.param(b"\xff\xfe", id="no UTF-8"),
]


@pytest.mark.parametrize("line", UNREADABLE)
def test_line_that_cannot_be_read_is_left_out(line: bytes, tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    claim_stage(files, 1)
    write_atomic(files.attempts / "1.json", encode(Lineage(attempt=1, start=None)))
    sample_log_path(files, 1).write_bytes(line + b"\n")
    SampleLog(files, 1).write(1, (5,))
    assert read_trained_samples(files, last_attempt=1) == {1: [5]}
    assert count_lost_steps(files, 2, start=0) == 1


def test_log_that_is_no_file_is_set_aside(tmp_path: Path) -> None:
    files = StageFiles(build_stage(tmp_path))
    files.attempts.mkdir(parents=True)
    os.mkfifo(sample_log_path(files, 1))
    assert count_lost_steps(files, 2, start=0) == 0
    SampleLog(files, 1).write(1, (5,))
    assert count_lost_steps(files, 2, start=0) == 1
