"""The chain of a stage's attempts: which one is the newest, which checkpoint it started from and which data it skips.

An attempt claims the stage by creating `attempts/<attempt>.json` before it chooses a checkpoint. From then on an older
attempt that still runs finds the file and stops: it neither saves nor deletes checkpoints nor writes the result. Files
that it had begun to write are in its own directory, which no later attempt reads.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sailvl_trainer.contract import Checkpoint, Lineage, NonFinite, Skip
from sailvl_trainer.errors import Preempted, StorageError
from sailvl_trainer.storage.documents import find_document, is_count, set_aside, write_document
from sailvl_trainer.storage.files import (
    describe_unavailable,
    is_existing,
    list_names,
    sync_directory,
    translate_read_errors,
    translate_storage_errors,
)
from sailvl_trainer.storage.layout import StageFiles

LINEAGE_NAME = re.compile(r"(\d{1,9})\.json", re.ASCII)
"""Name of a lineage; a number with more digits is no attempt of the operator, and would supersede all of them."""


def claim_stage(files: StageFiles, attempt: int) -> None:
    """Claim the stage for an attempt, which supersedes all older ones; a restart in place may claim it again.

    Raises Preempted if a later attempt has claimed the stage.
    """
    _check_no_later_attempt(files, attempt)
    with suppress(FileExistsError):
        _create_exclusively(lineage_path(files, attempt))


def check_not_superseded(files: StageFiles, attempt: int) -> None:
    """Check, before writing anything that attempts share, that the attempt still owns the stage.

    Raises Preempted if a later attempt has claimed the stage. Raises StorageError if the attempt's own claim is
    missing, because then the volume is unmounted and a write would go into the directory below its mount point.
    """
    _check_no_later_attempt(files, attempt)
    path = lineage_path(files, attempt)
    if not is_existing(path):
        raise StorageError(describe_unavailable(path, errno.ENOENT))


def find_newest_attempt(files: StageFiles) -> int:
    """Return the number of the latest attempt that has claimed the stage, or 0 if none has. Raises StorageError."""
    names = map(LINEAGE_NAME.fullmatch, list_names(files.attempts))
    return max((int(found[1]) for found in names if found), default=0)


def begin_attempt(
    files: StageFiles, attempt: int, *, is_usable: Callable[[Checkpoint], bool] = lambda checkpoint: True
) -> Lineage:
    """Claim the stage and return the checkpoint that the attempt starts from and the steps that it skips.

    Only one rank calls this. The first call writes the attempt's lineage; after a restart in place, the attempt
    resumes from its own newest checkpoint. A checkpoint that isn't usable counts as missing; if the attempt had started
    from it, the attempt chooses again.
    """
    claim_stage(files, attempt)
    own = next(filter(is_usable, files.list_checkpoints(attempt)), None)
    lineage = read_lineage(files, attempt)
    is_chosen = lineage is not None and (own is not None or lineage.start is None or is_usable(lineage.start))
    if lineage is None or not is_chosen:
        start, skips = _choose_start(files, attempt - 1, is_usable)
        lineage = Lineage(attempt=attempt, start=start, skips=skips)
        _replace_lineage(files, lineage)
    return lineage if own is None else replace(lineage, start=own)


def read_lineage(files: StageFiles, attempt: int) -> Lineage | None:
    """Return an attempt's lineage; None if the attempt never chose a checkpoint, or if the file can't be used.

    The file itself is the attempt's claim, whatever it holds, so it stays in its place. Raises StorageError if it can't
    be read: without it, the checkpoints that it leads to would look like those of no attempt.
    """
    path = lineage_path(files, attempt)
    try:
        with translate_read_errors(path):
            if path.stat().st_size == 0:
                return None
    except OSError:
        return None

    def check(lineage: Lineage) -> str:
        return "" if _is_valid(files, attempt, lineage) else "its attempt, checkpoint or skips are not possible"

    return find_document(Lineage, path, files.roots, check=check, should_set_aside=False)


def read_non_finite(files: StageFiles, attempt: int) -> NonFinite | None:
    """Return the record of an attempt that ended with NON_FINITE; None if there is none that can be used."""

    def check(record: NonFinite) -> str:
        is_valid = record.attempt == attempt and is_count(record.step, record.max_resume_step, *record.samples)
        return "" if is_valid and _are_valid(record.skips) else "its attempt, steps or skips are not possible"

    return find_document(NonFinite, non_finite_path(files, attempt), files.roots, check=check, should_set_aside=True)


def iter_checkpoints(files: StageFiles, attempt: int) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints that an attempt's weights descend from, newest first.

    They are the attempt's own, then those of each earlier attempt of its lineage up to the step it was left at.
    """
    last: int | None = None
    while True:
        for checkpoint in files.list_checkpoints(attempt):
            if last is None or checkpoint.step <= last:
                yield checkpoint
        lineage = read_lineage(files, attempt)
        found = None if lineage is None or lineage.start is None else files.parse_checkpoint_path(lineage.start.path)
        if found is None:
            return
        attempt, start = found
        last = start.step


def lineage_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of an attempt's lineage."""
    return files.attempts / f"{attempt}.json"


def non_finite_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of the record that an attempt writes before it ends with NON_FINITE."""
    return files.attempts / f"{attempt}.non-finite.json"


def _choose_start(
    files: StageFiles, attempt: int, is_usable: Callable[[Checkpoint], bool]
) -> tuple[Checkpoint | None, tuple[Skip, ...]]:
    """Return the checkpoint and the skips for the attempt that follows this one.

    The start is the newest checkpoint or, after a non-finite loss or gradient, the newest one before the skipped
    steps. A failed attempt that has a checkpoint at or after the failed step had recovered by a restart in place.
    """
    before = next((n for n in range(attempt, 0, -1) if read_lineage(files, n) is not None), 0)
    lineage, failure = read_lineage(files, before), read_non_finite(files, before)
    chain = list(filter(is_usable, iter_checkpoints(files, before)))
    newest = chain[0] if chain else None
    if failure is None or (newest is not None and newest.step >= failure.step):
        return newest, () if lineage is None else lineage.skips
    early = (checkpoint for checkpoint in chain if checkpoint.step <= failure.max_resume_step)
    return next(early, chain[-1] if chain else None), failure.skips


def _replace_lineage(files: StageFiles, lineage: Lineage) -> None:
    """Write the lineage over the claim, which exists throughout; content that can't be used is kept beside it.

    A folder is renamed first, since no file can replace it.
    """
    path = lineage_path(files, lineage.attempt)
    with translate_storage_errors(path):
        claim = os.lstat(path)
    is_folder = stat.S_ISDIR(claim.st_mode)
    if is_folder or claim.st_size > 0:
        set_aside(path, keep=not is_folder)
    write_document(path, lineage)


def _is_valid(files: StageFiles, attempt: int, lineage: Lineage) -> bool:
    """Return whether a lineage belongs to the attempt, and starts from a checkpoint of an earlier one."""
    if lineage.attempt != attempt or not _are_valid(lineage.skips):
        return False
    if lineage.start is None:
        return True
    found = files.parse_checkpoint_path(lineage.start.path)
    return found is not None and found[0] < attempt and found[1] == lineage.start


def _are_valid(skips: tuple[Skip, ...]) -> bool:
    return all(1 <= skip.first <= skip.last and is_count(skip.last, skip.step, skip.failures) for skip in skips)


def _check_no_later_attempt(files: StageFiles, attempt: int) -> None:
    newest = find_newest_attempt(files)
    if newest > attempt:
        message = f"attempt {newest} has claimed the stage; attempt {attempt} is superseded and stops"
        raise Preempted(message, superseded_by=newest)


def _create_exclusively(path: Path) -> None:
    """Create an empty file. Raises FileExistsError if it exists."""
    with translate_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        sync_directory(path.parent)
