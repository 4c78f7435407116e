"""Which attempt is the newest, which checkpoint it starts from and what it leaves out: one chain, whoever still writes.

An attempt claims the stage by creating ATTEMPTS_DIR/<attempt>.json, before it looks for a checkpoint. From then on an
older attempt, cut off but alive, meets the file and ends: it saves and prunes no more and can't write the result. What
it had begun to write stays in its own directory, off the chain.
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
from sailvl_trainer.storage.atomic import sync_directory, write_atomic
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.errors import describe_unavailable, storage_errors
from sailvl_trainer.storage.layout import StageFiles


def claim_stage(files: StageFiles, attempt: int) -> None:
    """Cut off all older attempts; a restart in place claims again. Raises Preempted for one that is cut off itself."""
    _require_no_later(files, attempt)
    with suppress(FileExistsError):
        _create(lineage_path(files, attempt))


def check_not_superseded(files: StageFiles, attempt: int) -> None:
    """Before anything that attempts share is written. Raises Preempted once a later attempt has claimed the stage.

    Raises StorageError where this attempt's own claim is gone: all would be written into the bare folder under a volume
    that isn't mounted any more.
    """
    _require_no_later(files, attempt)
    path = lineage_path(files, attempt)
    if not path.exists():
        raise StorageError(describe_unavailable(path, errno.ENOENT))


def find_newest_attempt(files: StageFiles) -> int:
    """The latest attempt that has claimed the stage; 0: none."""
    names = (path.stem for path in files.attempts.glob("*.json"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def begin_attempt(files: StageFiles, attempt: int) -> Lineage:
    """Where an attempt starts and what it leaves out. Called by one rank.

    The first call writes the attempt's lineage; a restart in place goes on from its own newest checkpoint.
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
    """None for an attempt that never began, or that ended between claiming the stage and looking for its start."""
    path = lineage_path(files, attempt)
    data = path.read_bytes() if path.exists() else b""
    return decode(Lineage, data) if data else None


def read_non_finite(files: StageFiles, attempt: int) -> NonFinite | None:
    """Why an attempt ended with NON_FINITE; None: it didn't."""
    path = non_finite_path(files, attempt)
    return decode(NonFinite, path.read_bytes()) if path.exists() else None


def iter_checkpoints(files: StageFiles, attempt: int) -> Iterator[Checkpoint]:
    """Whole checkpoints that an attempt's weights came through, newest first: its own, then back along the lineage."""
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
    """Where an attempt's lineage is."""
    return files.attempts / f"{attempt}.json"


def non_finite_path(files: StageFiles, attempt: int) -> Path:
    """Where an attempt says why it ended with NON_FINITE."""
    return files.attempts / f"{attempt}.non-finite.json"


def _choose_start(files: StageFiles, attempt: int) -> tuple[Checkpoint | None, tuple[Skip, ...]]:
    """Of the attempt after this one: the newest checkpoint, or after a number that was none one before the skip.

    An attempt that got past the number, since its ranks were started again in place, has overcome it.
    """
    before = next((n for n in range(attempt, 0, -1) if read_lineage(files, n) is not None), 0)
    lineage, failure = read_lineage(files, before), read_non_finite(files, before)
    chain = list(iter_checkpoints(files, before))
    newest = chain[0] if chain else None
    if failure is None or (newest is not None and newest.step >= failure.step):
        return newest, () if lineage is None else lineage.skips
    early = (checkpoint for checkpoint in chain if checkpoint.step <= failure.max_resume_step)
    return next(early, chain[-1] if chain else None), failure.skips


def _require_no_later(files: StageFiles, attempt: int) -> None:
    newest = find_newest_attempt(files)
    if newest > attempt:
        words = f"attempt {newest} has begun and goes on from a checkpoint; attempt {attempt} is cut off, ends"
        raise Preempted(words, superseded_by=newest)


def _create(path: Path) -> None:
    """An empty file that must not be there yet. Raises FileExistsError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        sync_directory(path.parent)
