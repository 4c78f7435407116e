"""Compare files that another run wrote with the hashes in their manifests, by all ranks together, before they are used.

Reading terabytes takes hours, so each verified file is recorded below the run's own directory, with its size, time of
modification and hash: a later attempt, and the run's other stages, read only files that are new or were changed since.
Heartbeats continue throughout, and a stop request is obeyed within seconds, in the middle of a file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.errors import DataError
from sailvl_trainer.rank.collectives import all_gather_values, broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import iterate_lines
from sailvl_trainer.storage.files import format_bytes, translate_read_errors, translate_storage_errors
from sailvl_trainer.storage.hashes import HashedFile, describe_difference

STAT_THREADS = 16
"""Threads that ask for the sizes of files, because each answer of a network volume takes about a millisecond."""
LOG_SECONDS = 30.0
"""Minimum time between two log messages about the progress."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedFile:
    """One line of the record: a file whose content had this hash when it had this size and time of modification."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def verify_input(context: Context, files: Sequence[HashedFile], *, advice: str) -> None:
    """Compare an input's files with their manifests, except those that this run wrote. COLLECTIVE.

    Every rank passes the same files. `advice` says what to do about a file that differs. Raises DataError on every
    rank if there is one, StorageError if a file can't be read, Preempted if a stop was requested.
    """
    is_own = {folder: is_from_this_run(context, folder) for folder in {file.path.parent for file in files}}
    foreign = [file for file in files if not is_own[file.path.parent]]
    roots = DataRoots.resolve(context.files.storage, *(folder for folder in is_own if not is_own[folder]))
    damage = describe_damage(context, foreign, roots)
    if damage:
        raise DataError(f"{damage}; {advice}")


def describe_damage(context: Context, files: Sequence[HashedFile], roots: DataRoots) -> str:
    """Return how the first file that differs from its manifest does so; empty if none differs. COLLECTIVE.

    Every rank passes the same files. Raises StorageError if a file can't be read, Preempted if a stop was requested.
    """
    pending = broadcast_value(list[int], _list_pending(context, files) if context.is_first else None)
    if not pending:
        return ""
    if context.is_first:
        total = format_bytes(sum(files[number].expected.bytes for number in pending))
        logger.info("verifying the hashes of %d of %d files, %s", len(pending), len(files), total)
    damages: dict[int, str] = {}
    report, pool = _build_progress_log(context, len(pending)), TaskPool(context)

    def verify(task: int) -> None:
        number = pending[task]
        problem = _verify_file(context, files[number], roots, pool.report_activity)
        if problem:
            damages[number] = f"{files[number].path}: {problem}"
        report(task)

    pool.run("hashing", len(pending), lambda task: False, verify)
    found = [damage for rank in all_gather_values(list[tuple[int, str]], sorted(damages.items())) for damage in rank]
    return min(found)[1] if found else ""


def is_from_this_run(context: Context, path: Path) -> bool:
    """Return whether a file or directory is in this run's own directory, so that no other run wrote it."""
    return DataRoots.resolve(context.files.run).contains(os.path.realpath(path))


def _verify_file(context: Context, file: HashedFile, roots: DataRoots, on_chunk: Callable[[], None]) -> str:
    """Return how a file differs from its manifest; if it doesn't, record it and return an empty string."""
    before = _describe_state(file)
    problem = describe_difference(file, roots, on_chunk)
    if not problem and before is not None and before == _describe_state(file):
        path = context.files.verified / f"{context.files.output.name}-{context.stage.attempt}-{context.rank}.jsonl"
        with translate_storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as record:
                record.write(encode(before) + b"\n")
    return problem


def _list_pending(context: Context, files: Sequence[HashedFile]) -> list[int]:
    """Return the numbers of the files that aren't recorded as they are now."""
    records = context.files.verified.glob("*.jsonl")
    verified = {line for path in records for line in iterate_lines(VerifiedFile, path, context.files.roots)}
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        pending = []
        for number, state in enumerate(threads.map(_describe_state, files)):
            context.telemetry.update()
            if state not in verified:
                pending.append(number)
    return pending


def _describe_state(file: HashedFile) -> VerifiedFile | None:
    """Return the record of a file as it is now, if it has the expected hash; None if it doesn't exist."""
    try:
        with translate_read_errors(file.path):
            state = file.path.stat()
    except OSError:
        return None
    return VerifiedFile(
        path=os.path.abspath(file.path),
        bytes=state.st_size,
        mtime_ns=state.st_mtime_ns,
        sha256=file.expected.sha256,
    )


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
