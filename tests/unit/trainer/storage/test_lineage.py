"""Attempts of a stage form one chain: each has one start, and a superseded attempt that still runs changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage, NonFinite, Skip
from sailvl_trainer.errors import Preempted, StorageError
from sailvl_trainer.storage import lineage
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import (
    begin_attempt,
    check_not_superseded,
    claim_stage,
    iter_checkpoints,
    lineage_path,
    non_finite_path,
    read_lineage,
)
from sailvl_trainer.train.checkpoint import delete_old_checkpoints
from tests.support.builders.worker import build_stage

SKIP = Skip(first=15, last=18, step=17, failures=2)


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    return StageFiles(build_stage(tmp_path))


def write_checkpoint(files: StageFiles, attempt: int, step: int) -> Checkpoint:
    write_atomic(files.checkpoint_dir(attempt, step) / MANIFEST_FILE, b"{}")
    return Checkpoint(step=step, path=files.relative_path(files.checkpoint_dir(attempt, step)))


def write_non_finite(files: StageFiles, attempt: int, step: int, *skips: Skip) -> None:
    """Write the record of an attempt whose loss was not finite; its last skip is the new one."""
    record = NonFinite(
        attempt=attempt,
        step=step,
        quantity="loss",
        value="nan",
        samples=(1, 2),
        max_resume_step=skips[-1].first - 1,
        skips=skips,
    )
    write_atomic(non_finite_path(files, attempt), encode(record))


def test_attempt_starts_from_newest_complete_checkpoint(files: StageFiles) -> None:
    assert begin_attempt(files, 1) == Lineage(attempt=1, start=None)
    write_checkpoint(files, 1, 10)
    newest = write_checkpoint(files, 1, 20)
    files.checkpoint_dir(1, 30).mkdir()  # the attempt was killed while saving
    assert begin_attempt(files, 2) == Lineage(attempt=2, start=newest)


def test_attempt_without_checkpoint_passes_its_start_on(files: StageFiles) -> None:
    begin_attempt(files, 1)
    newest = write_checkpoint(files, 1, 10)
    begin_attempt(files, 2)
    claim_stage(files, 3)  # the attempt ended before it chose a checkpoint
    assert begin_attempt(files, 4).start == newest


def test_restart_in_place_resumes_from_own_checkpoint(files: StageFiles) -> None:
    begin_attempt(files, 1)
    write_checkpoint(files, 1, 10)
    begin_attempt(files, 2)
    own = write_checkpoint(files, 2, 20)
    assert begin_attempt(files, 2).start == own


def test_lineage_left_empty_by_a_power_loss_is_rewritten(files: StageFiles) -> None:
    claim_stage(files, 1)
    assert read_lineage(files, 1) is None
    assert begin_attempt(files, 1).start is None
    assert json.loads(lineage_path(files, 1).read_text()) == json.loads(encode(Lineage(attempt=1, start=None)))


def test_deleted_checkpoint_is_not_a_start(files: StageFiles) -> None:
    """The message about a damaged checkpoint advises to delete it."""
    begin_attempt(files, 1)
    whole, damaged = write_checkpoint(files, 1, 10), write_checkpoint(files, 1, 20)
    assert begin_attempt(files, 2).start == damaged
    (files.storage / damaged.path / MANIFEST_FILE).unlink()
    assert begin_attempt(files, 3).start == whole


def test_superseded_attempt_names_its_successor(files: StageFiles) -> None:
    """A new run that reuses a deleted run's name continues after that run's attempt numbers."""
    claim_stage(files, 11)
    with pytest.raises(Preempted) as caught:
        claim_stage(files, 1)
    assert caught.value.superseded_by == 11


# Writes of attempt 1 after attempt 2 has started from its step 10.
LATE_WRITES: list[object] = [
    pytest.param(lambda files: write_checkpoint(files, 1, 50), id="a checkpoint"),
    pytest.param(lambda files: write_non_finite(files, 1, 55, SKIP), id="a non-finite record"),
    pytest.param(lambda files: delete_old_checkpoints(files, 1, 1), id="nothing, but it prunes"),
    pytest.param(
        lambda files: (write_checkpoint(files, 1, 50), delete_old_checkpoints(files, 1, 1)),
        id="a checkpoint, and it prunes",
    ),
]


@pytest.mark.parametrize("write", LATE_WRITES)
def test_superseded_attempt_changes_nothing(write: Callable[[StageFiles], object], files: StageFiles) -> None:
    begin_attempt(files, 1)
    start = write_checkpoint(files, 1, 10)
    second = begin_attempt(files, 2)
    assert second == Lineage(attempt=2, start=start)
    write(files)
    assert begin_attempt(files, 2) == second, "also after a restart in place"
    assert list(iter_checkpoints(files, 2)) == [start], "its start still exists"
    assert begin_attempt(files, 3) == Lineage(attempt=3, start=start)
    own = write_checkpoint(files, 3, 20)
    delete_old_checkpoints(files, 3, 2)
    assert list(iter_checkpoints(files, 3)) == [own, start]
    assert not files.checkpoint_dir(1, 50).exists(), "the next attempt that saves deletes it"


def test_missing_claim_means_unavailable_volume(files: StageFiles) -> None:
    claim_stage(files, 1)
    shutil.rmtree(files.output)
    with pytest.raises(StorageError, match=r"the volume of \S+/attempts/1\.json is unavailable"):
        check_not_superseded(files, 1)


@pytest.mark.parametrize("do", [claim_stage, begin_attempt, check_not_superseded], ids=lambda f: f.__name__)
def test_attempt_stops_once_a_later_one_has_claimed_the_stage(
    do: Callable[[StageFiles, int], object], files: StageFiles
) -> None:
    claim_stage(files, 1)
    check_not_superseded(files, 1)
    claim_stage(files, 12)
    with pytest.raises(Preempted, match=r"attempt 12 has claimed the stage; attempt 1 is superseded"):
        do(files, 1)
    check_not_superseded(files, 12)


def test_attempt_claims_the_stage_before_it_chooses_a_checkpoint(
    files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the older attempt, which saves and prunes right after the choice here, could delete the chosen one."""
    begin_attempt(files, 1)
    write_checkpoint(files, 1, 10)

    def list_before_a_late_save(files: StageFiles, attempt: int) -> Iterator[Checkpoint]:
        found = list(iter_checkpoints(files, attempt))
        write_checkpoint(files, 1, 20)
        delete_old_checkpoints(files, 1, 1)
        return iter(found)

    monkeypatch.setattr(lineage, "iter_checkpoints", list_before_a_late_save)
    start = begin_attempt(files, 2).start
    assert start is not None
    assert (files.storage / start.path / MANIFEST_FILE).exists()


# saved steps of attempt 1, its failed step, (first, last) of the skip → the step that attempt 2 starts from
REWINDS = [
    pytest.param([5, 10, 15], 17, (17, 17), 15, id="one step is skipped: the newest"),
    pytest.param([5, 10, 15], 17, (12, 20), 10, id="a range is skipped: the newest before it"),
    pytest.param([5, 10, 15], 17, (11, 20), 10, id="the checkpoint right before the range"),
    pytest.param([10, 15], 17, (6, 30), 10, id="none before the range: the oldest"),
    pytest.param([], 2, (2, 2), None, id="no checkpoint"),
]


@pytest.mark.parametrize(("saved", "failed", "skip", "start"), REWINDS)
def test_attempt_after_non_finite_starts_before_the_skipped_steps(
    saved: list[int], failed: int, skip: tuple[int, int], start: int | None, files: StageFiles
) -> None:
    begin_attempt(files, 1)
    for step in saved:
        write_checkpoint(files, 1, step)
    made = Skip(first=skip[0], last=skip[1], step=failed, failures=1)
    write_non_finite(files, 1, failed, SKIP, made)
    second = begin_attempt(files, 2)
    assert second.skips == (SKIP, made)
    assert (None if second.start is None else second.start.step) == start
    assert begin_attempt(files, 3) == Lineage(attempt=3, start=second.start, skips=second.skips), "later attempts too"


def test_failure_before_a_later_checkpoint_is_ignored(files: StageFiles) -> None:
    """The ranks were killed before they could exit, restarted in place, and the loss was finite."""
    begin_attempt(files, 1)
    write_non_finite(files, 1, 17, SKIP)
    past = write_checkpoint(files, 1, 20)
    assert begin_attempt(files, 2) == Lineage(attempt=2, start=past)
