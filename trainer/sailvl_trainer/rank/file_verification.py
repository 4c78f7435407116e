"""Compare files that another run wrote with the hashes in their manifests, by all ranks together, before they are used.

Reading terabytes takes hours, so a later attempt, and the run's other stages, read only files that are new or were
changed since; see storage/verified_files.py. Heartbeats continue throughout, and a stop request is obeyed within
seconds, in the middle of a file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from sailvl_trainer.errors import DataError
from sailvl_trainer.rank.collectives import all_gather_values, broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.files import format_bytes
from sailvl_trainer.storage.hashes import HashedFile
from sailvl_trainer.storage.verified_files import VerifiedFiles

LOG_SECONDS = 30.0
"""Minimum time between two log messages about the progress."""

logger = logging.getLogger(__name__)


def verify_input(context: Context, files: Sequence[HashedFile], *, advice: str) -> None:
    """Compare an input's files with their manifests, except those that this run wrote. COLLECTIVE.

    Every rank passes the same files. `advice` says what to do about a file that differs. Raises DataError on every
    rank if there is one, StorageError if a file can't be read, Preempted if a stop was requested.
    """
    is_own = {folder: context.files.is_from_this_run(folder) for folder in {file.path.parent for file in files}}
    foreign = [file for file in files if not is_own[file.path.parent]]
    roots = DataRoots.resolve(context.files.storage, *(folder for folder in is_own if not is_own[folder]))
    damage = describe_damage(context, foreign, roots)
    if damage:
        raise DataError(f"{damage}; {advice}")


def describe_damage(context: Context, files: Sequence[HashedFile], roots: DataRoots) -> str:
    """Return how the first file that differs from its manifest does so; empty if none differs. COLLECTIVE.

    Every rank passes the same files. Raises StorageError if a file can't be read, Preempted if a stop was requested.
    """
    record = VerifiedFiles(context.files, attempt=context.stage.attempt, writer=str(context.rank))
    pending = broadcast_value(list[int], _list_pending(context, record, files) if context.is_first else None)
    if not pending:
        return ""
    if context.is_first:
        total = format_bytes(sum(files[number].expected.bytes for number in pending))
        logger.info("verifying the hashes of %d of %d files, %s", len(pending), len(files), total)
    damages: dict[int, str] = {}
    report, pool = _build_progress_log(context, len(pending)), TaskPool(context)

    def verify(task: int) -> None:
        number = pending[task]
        problem = record.verify(files[number], roots, pool.report_activity)
        if problem:
            damages[number] = f"{files[number].path}: {problem}"
        report(task)

    pool.run("hashing", len(pending), lambda task: False, verify)
    found = [damage for rank in all_gather_values(list[tuple[int, str]], sorted(damages.items())) for damage in rank]
    return min(found)[1] if found else ""


def _list_pending(context: Context, record: VerifiedFiles, files: Sequence[HashedFile]) -> list[int]:
    record.merge_superseded()
    return record.list_pending(files, context.telemetry.update)


def _build_progress_log(context: Context, total: int) -> Callable[[int], None]:
    """Return the function that logs the number of a verified file, at most every LOG_SECONDS, on the first rank only.

    Ranks claim files in order, so the number of the latest one shows how many have been claimed.
    """
    logged = time.monotonic()

    def report(number: int) -> None:
        nonlocal logged
        if context.is_first and time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            logger.info("verifying hashes: file %d of %d", number + 1, total)

    return report
