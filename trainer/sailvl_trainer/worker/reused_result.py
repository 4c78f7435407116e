"""Reuse another run's result before there are ranks, so that a stage without work takes a second.

Worker 0 verifies the files of the result and records the reuse for the other workers of the attempt. Whatever takes
long or goes wrong is left to the ranks, which verify the remaining files together: see rank/reused_result.py. Called by
worker/main.py; nothing here imports torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sailvl_trainer.contract import Result, Stage
from sailvl_trainer.errors import DataError, StorageError
from sailvl_trainer.rank.cgroup import count_cores
from sailvl_trainer.storage.files import format_bytes, translate_read_errors
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.result_files import list_result_files
from sailvl_trainer.storage.verified_files import VerifiedFiles

VERIFICATION_SECONDS = 60.0
"""Longest time for worker 0 to verify a result alone. All ranks read faster, but start within ten seconds or more."""
PEER_SECONDS = 2.0
"""Time for which the other workers wait for worker 0 before they import torch, whose imports would slow it down."""
PEER_POLL_SECONDS = 0.05
MAX_THREADS = 16
"""Maximum number of files that are hashed at once; more would not make the storage faster."""

logger = logging.getLogger(__name__)


class VerificationStoppedError(Exception):
    """The verification was stopped: it took too long, or another file differs."""


def reuse_result(files: StageFiles, stage: Stage, *, is_first: bool) -> Result | None:
    """Return another run's result once it is verified and recorded as reused; None if the ranks have to decide.

    `is_first`: whether this is worker 0.
    """
    found = None
    try:
        with translate_read_errors(files.output):
            found = files.find_other_result()
            if found is None or not is_first:
                return found and _wait_for_first_worker(files)
            problem = _describe_problem(files, stage, found)
            if not problem:
                files.record_reuse(found)
                return found
    except (DataError, StorageError, VerificationStoppedError) as error:
        problem = str(error)
    place = "another run" if found is None else found.output
    logger.info("the ranks decide whether the result of %s is reused: %s", place, problem)
    return None


def _wait_for_first_worker(files: StageFiles) -> Result | None:
    """Return the result that worker 0 has recorded; None if it records none within PEER_SECONDS."""
    until = time.monotonic() + PEER_SECONDS
    while (found := files.find_usable_result()) is None and time.monotonic() < until:
        time.sleep(PEER_POLL_SECONDS)
    return found


def _describe_problem(files: StageFiles, stage: Stage, result: Result) -> str:
    """Return how a file of the result differs from its manifest; empty if none does. This run's own are not read."""
    output = files.storage / result.output
    if files.is_from_this_run(output):
        return ""
    hashed, stop = list_result_files(stage.kind, output, files.storage), threading.Event()
    record = VerifiedFiles(files, attempt=stage.attempt, writer="worker")
    check = _build_check(stop)
    record.merge_superseded()
    pending = [hashed[number] for number in record.list_pending(hashed, check)]
    size = format_bytes(sum(file.expected.bytes for file in pending))
    logger.info("verifying the result in %s: %d of %d files, %s", result.output, len(pending), len(hashed), size)
    with ThreadPoolExecutor(min(MAX_THREADS, count_cores())) as threads:
        try:
            problems = threads.map(lambda file: record.verify(file, files.roots, check), pending)
            found = ((file, problem) for file, problem in zip(pending, problems, strict=True) if problem)
            return next((f"{file.path}: {problem}" for file, problem in found), "")
        finally:
            stop.set()


def _build_check(stop: threading.Event) -> Callable[[], None]:
    """Return a function that raises VerificationStoppedError once `stop` is set or the time has passed."""
    until = time.monotonic() + VERIFICATION_SECONDS

    def check() -> None:
        if stop.is_set() or time.monotonic() > until:
            raise VerificationStoppedError(f"its files were not verified within {VERIFICATION_SECONDS:.0f} s")

    return check
