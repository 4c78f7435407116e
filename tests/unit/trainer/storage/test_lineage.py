"""One chain of attempts: where each starts, what it leaves out, and that an older one which still lives harms none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage, NonFinite, Skip
from sailvl_trainer.errors import Preempted, StorageError
from sailvl_trainer.storage import lineage
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode
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
from sailvl_trainer.train.prune import prune
from tests.support.builders.worker import build_stage

SKIP = Skip(first=15, last=18, step=17, failures=2)


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    return StageFiles(build_stage(tmp_path))


def complete(files: StageFiles, attempt: int, step: int) -> Checkpoint:
    write_atomic(files.checkpoint_dir(attempt, step) / MANIFEST_FILE, b"{}")
    return Checkpoint(step=step, path=files.relative_path(files.checkpoint_dir(attempt, step)))


def fail(files: StageFiles, attempt: int, step: int, *skips: Skip) -> None:
    """The attempt met a loss that was no number."""
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


def test_an_attempt_goes_on_from_the_one_before(files: StageFiles) -> None:
    assert begin_attempt(files, 1) == Lineage(attempt=1, start=None)
    complete(files, 1, 10)
    newest = complete(files, 1, 20)
    files.checkpoint_dir(1, 30).mkdir()  # killed while saving
    assert begin_attempt(files, 2) == Lineage(attempt=2, start=newest)


def test_an_attempt_that_saved_nothing_hands_its_start_on(files: StageFiles) -> None:
    begin_attempt(files, 1)
    newest = complete(files, 1, 10)
    begin_attempt(files, 2)
    claim_stage(files, 3)  # ended before it looked for its start
    assert begin_attempt(files, 4).start == newest


def test_a_restart_in_place_goes_on_from_its_own(files: StageFiles) -> None:
    begin_attempt(files, 1)
    complete(files, 1, 10)
    begin_attempt(files, 2)
    own = complete(files, 2, 20)
    assert begin_attempt(files, 2).start == own


def test_a_lineage_left_empty_by_a_power_loss_is_written_again(files: StageFiles) -> None:
    claim_stage(files, 1)
    assert read_lineage(files, 1) is None
    assert begin_attempt(files, 1).start is None
    assert json.loads(lineage_path(files, 1).read_text()) == {"attempt": 1, "start": None, "skips": []}


def test_a_checkpoint_that_people_took_away_is_no_start(files: StageFiles) -> None:
    """As they are told to do with a damaged one."""
    begin_attempt(files, 1)
    whole, damaged = complete(files, 1, 10), complete(files, 1, 20)
    assert begin_attempt(files, 2).start == damaged
    (files.storage / damaged.path / MANIFEST_FILE).unlink()
    assert begin_attempt(files, 3).start == whole


def test_one_that_is_cut_off_tells_by_whom(files: StageFiles) -> None:
    """So that a run whose name was another's before it passes that one's attempts by."""
    claim_stage(files, 11)
    with pytest.raises(Preempted) as caught:
        claim_stage(files, 1)
    assert caught.value.superseded_by == 11


# What attempt 1 writes after attempt 2 has begun from its step 10.
LATE: list[object] = [
    pytest.param(lambda files: complete(files, 1, 50), id="a checkpoint"),
    pytest.param(lambda files: fail(files, 1, 55, SKIP), id="that its loss was no number"),
    pytest.param(lambda files: prune(files, 1, 1), id="nothing: it prunes"),
    pytest.param(lambda files: (complete(files, 1, 50), prune(files, 1, 1)), id="a checkpoint, and it prunes"),
]


@pytest.mark.parametrize("write", LATE)
def test_what_a_cut_off_attempt_does_changes_nothing(write: Callable[[StageFiles], object], files: StageFiles) -> None:
    begin_attempt(files, 1)
    start = complete(files, 1, 10)
    second = begin_attempt(files, 2)
    assert second == Lineage(attempt=2, start=start)
    write(files)
    assert begin_attempt(files, 2) == second, "also when it is started again in place"
    assert list(iter_checkpoints(files, 2)) == [start], "its start is there still"
    assert begin_attempt(files, 3) == Lineage(attempt=3, start=start)
    own = complete(files, 3, 20)
    prune(files, 3, 2)
    assert list(iter_checkpoints(files, 3)) == [own, start]
    assert not files.checkpoint_dir(1, 50).exists(), "and the next to save clears it away"


def test_a_claim_that_is_gone_means_that_the_storage_is(files: StageFiles) -> None:
    claim_stage(files, 1)
    shutil.rmtree(files.output)
    with pytest.raises(StorageError, match=r"the volume of \S+/attempts/1\.json is gone"):
        check_not_superseded(files, 1)


@pytest.mark.parametrize("do", [claim_stage, begin_attempt, check_not_superseded], ids=lambda f: f.__name__)
def test_an_attempt_ends_where_a_later_one_has_begun(
    do: Callable[[StageFiles, int], object], files: StageFiles
) -> None:
    claim_stage(files, 1)
    check_not_superseded(files, 1)
    claim_stage(files, 12)
    with pytest.raises(Preempted, match=r"attempt 12 has begun .* attempt 1 is cut off"):
        do(files, 1)
    check_not_superseded(files, 12)


def test_the_next_attempt_claims_before_it_looks(files: StageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the older one could remove what was just chosen: here it saves and prunes right after the look."""
    begin_attempt(files, 1)
    complete(files, 1, 10)

    def look(files: StageFiles, attempt: int) -> Iterator[Checkpoint]:
        found = list(iter_checkpoints(files, attempt))
        complete(files, 1, 20)
        prune(files, 1, 1)
        return iter(found)

    monkeypatch.setattr(lineage, "iter_checkpoints", look)
    start = begin_attempt(files, 2).start
    assert start is not None
    assert (files.storage / start.path / MANIFEST_FILE).exists()


# saved steps of attempt 1, its failing step, (first, last) of the skip → the step that attempt 2 starts from
REWINDS = [
    pytest.param([5, 10, 15], 17, (17, 17), 15, id="one batch: from the newest"),
    pytest.param([5, 10, 15], 17, (12, 20), 10, id="a range: from before it"),
    pytest.param([5, 10, 15], 17, (11, 20), 10, id="right before it"),
    pytest.param([10, 15], 17, (6, 30), 10, id="the oldest there is"),
    pytest.param([], 2, (2, 2), None, id="none was saved"),
]


@pytest.mark.parametrize(("saved", "failed", "skip", "start"), REWINDS)
def test_after_a_number_that_was_none(
    saved: list[int], failed: int, skip: tuple[int, int], start: int | None, files: StageFiles
) -> None:
    begin_attempt(files, 1)
    for step in saved:
        complete(files, 1, step)
    made = Skip(first=skip[0], last=skip[1], step=failed, failures=1)
    fail(files, 1, failed, SKIP, made)
    second = begin_attempt(files, 2)
    assert second.skips == (SKIP, made)
    assert (None if second.start is None else second.start.step) == start
    assert begin_attempt(files, 3) == Lineage(attempt=3, start=second.start, skips=second.skips), "it is handed on"


def test_a_failure_that_was_got_past_is_over(files: StageFiles) -> None:
    """Its ranks were killed before they could end, started again in place, and saw a number."""
    begin_attempt(files, 1)
    fail(files, 1, 17, SKIP)
    past = complete(files, 1, 20)
    assert begin_attempt(files, 2) == Lineage(attempt=2, start=past)
