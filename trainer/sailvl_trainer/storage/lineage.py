"""The chain of a stage's attempts: which one is the newest, which checkpoint it started from and which data it skips.

An attempt claims the stage by creating `attempts/<attempt>.json` before it chooses a checkpoint. From then on an older
attempt that still runs finds the file and stops: it neither saves nor deletes checkpoints nor writes the result. Files
that it had begun to write are in its own directory, which no later attempt reads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage, NonFinite, Skip
from sailvl_trainer.errors import Preempted, StorageError
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.files import describe_unavailable, sync_directory, translate_storage_errors, write_atomic
from sailvl_trainer.storage.layout import StageFiles


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
    if not path.exists():
        raise StorageError(describe_unavailable(path, errno.ENOENT))


def find_newest_attempt(files: StageFiles) -> int:
    """Return the number of the latest attempt that has claimed the stage, or 0 if none has."""
    names = (path.stem for path in files.attempts.glob("*.json"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def begin_attempt(files: StageFiles, attempt: int) -> Lineage:
    """Claim the stage and return the checkpoint that the attempt starts from and the steps that it skips.

    Only one rank calls this. The first call writes the attempt's lineage; after a restart in place, the attempt
    resumes from its own newest checkpoint.
    """
    claim_stage(files, attempt)
    lineage = read_lineage(files, attempt)
    if lineage is not None:
        return replace(lineage, start=files.find_newest_checkpoint(attempt) or lineage.start)
    start, skips = _choose_start(files, attempt - 1)
    lineage = Lineage(attempt=attempt, start=start, skips=skips)
    write_atomic(lineage_path(files, attempt), encode(lineage))
    return lineage


def read_lineage(files: StageFiles, attempt: int) -> Lineage | None:
    """Return an attempt's lineage, or None if the attempt never chose a checkpoint (its claim is missing or empty)."""
    path = lineage_path(files, attempt)
    data = path.read_bytes() if path.exists() else b""
    return decode(Lineage, data) if data else None


def read_non_finite(files: StageFiles, attempt: int) -> NonFinite | None:
    """Return the record of an attempt that ended with NON_FINITE, or None if it ended otherwise."""
    path = non_finite_path(files, attempt)
    return decode(NonFinite, path.read_bytes()) if path.exists() else None


def iter_checkpoints(files: StageFiles, attempt: int) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints that an attempt's weights descend from, newest first.

    They are the attempt's own, then those of each earlier attempt of its lineage up to the step it was left at.
    """
    last: int | None = None
    while True:
        own = sorted(files.checkpoint_dir(attempt, 0).parent.glob(f"step-*/{MANIFEST_FILE}"), reverse=True)
        for checkpoint in map(files.build_checkpoint, own):
            if last is None or checkpoint.step <= last:
                yield checkpoint
        lineage = read_lineage(files, attempt)
        if lineage is None or lineage.start is None:
            return
        last, attempt = lineage.start.step, int(Path(lineage.start.path).parent.name.removeprefix("attempt-"))


def lineage_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of an attempt's lineage."""
    return files.attempts / f"{attempt}.json"


def non_finite_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of the record that an attempt writes before it ends with NON_FINITE."""
    return files.attempts / f"{attempt}.non-finite.json"


def _choose_start(files: StageFiles, attempt: int) -> tuple[Checkpoint | None, tuple[Skip, ...]]:
    """Return the checkpoint and the skips for the attempt that follows this one.

    The start is the newest checkpoint or, after a non-finite loss or gradient, the newest one before the skipped
    steps. A failed attempt that has a checkpoint at or after the failed step had recovered by a restart in place.
    """
    before = next((n for n in range(attempt, 0, -1) if read_lineage(files, n) is not None), 0)
    lineage, failure = read_lineage(files, before), read_non_finite(files, before)
    chain = list(iter_checkpoints(files, before))
    newest = chain[0] if chain else None
    if failure is None or (newest is not None and newest.step >= failure.step):
        return newest, () if lineage is None else lineage.skips
    early = (checkpoint for checkpoint in chain if checkpoint.step <= failure.max_resume_step)
    return next(early, chain[-1] if chain else None), failure.skips


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
