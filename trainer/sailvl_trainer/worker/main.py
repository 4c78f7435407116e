"""A worker, PID 1 of its container: it handles SIGTERM, watches and serves its ranks, and exits with their root cause.

Started by `sailvl_trainer.__main__`; it runs the ranks with `worker/agent.py`. Modules that import torch are imported
late: that takes seconds, and PID 1 ignores SIGTERM until a handler is set.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import NoReturn

from sailvl_trainer.contract import ExitCode, Progress, Result, Stage, Termination
from sailvl_trainer.errors import StorageError, TrainerError
from sailvl_trainer.rank.settings import Scratch, Settings, read_settings, read_termination_log
from sailvl_trainer.storage.codec import encode, read_stage
from sailvl_trainer.storage.files import translate_read_errors, write_atomic
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.exit import WorkerExit, handle_sigterm
from sailvl_trainer.worker.ranks import RankProcesses
from sailvl_trainer.worker.reused_result import reuse_result
from sailvl_trainer.worker.watchdog import WatchdogTimeouts, start_watchdog

MIN_START_SLACK_SECONDS = 300
"""Shortest time, after the start timeout, for workers to import their modules and to find each other."""
RESULT_POLL_SECONDS = 5.0
"""Seconds between two checks for a usable result while the ranks aren't started yet."""


def main(rank_module: str = "sailvl_trainer.rank.main") -> NoReturn:
    """Run a worker, from its environment to its exit code. `rank_module` is the main module of every rank."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    prepare_environment(os.environ)
    ranks = RankProcesses()
    exit_worker = WorkerExit(read_termination_log(os.environ), ranks)
    try:
        termination = _run(read_settings(os.environ), ranks, rank_module, exit_worker)
    except BaseException as error:  # noqa: BLE001  # every error is reported to the operator
        termination = _describe_error(error)
    exit_worker(termination)


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Set variables that libraries expect, unless they are set: a writable home, a user name, no progress bars.

    A container's numeric user may have neither a name nor a home, and its root file system is read-only.
    """
    if not os.access(environment.get("HOME") or "/", os.W_OK):
        environment["HOME"] = "/tmp"
    environment.setdefault("USER", "sailvl")
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _run(settings: Settings, ranks: RankProcesses, rank_module: str, exit_worker: WorkerExit) -> Termination:
    """Start the worker's threads, then run the ranks, unless there is a result whose files are its own or verified."""
    scratch = Scratch(settings.scratch)
    scratch.prepare()
    exit_worker.progress_file = scratch.progress_file
    handle_sigterm(ranks, scratch, settings.grace_seconds, exit_worker)
    stage = read_stage(settings.stage_file)
    start_watchdog(
        ranks, scratch, timeouts=_build_timeouts(settings, stage), nodes=settings.nodes, exit_worker=exit_worker
    )
    files = StageFiles(stage)
    with translate_read_errors(files.output):
        found = files.find_usable_result()
    if found is not None:
        return _build_success(settings, found)
    _watch_for_result(files, ranks, lambda result: exit_worker(_build_success(settings, result)))
    _start_server(settings, stage, scratch)
    found = reuse_result(files, stage, is_first=settings.node_rank == 0)
    if found is not None:
        return _build_success(settings, found)
    from sailvl_trainer.worker.agent import run_ranks

    return add_result(run_ranks(settings, ranks, rank_module, exit_worker), settings, files, ranks)


def add_result(termination: Termination, settings: Settings, files: StageFiles, ranks: RankProcesses) -> Termination:
    """Return the termination of a worker, with the stage's result if the ranks have succeeded.

    Peers that find a usable result exit without ranks. A worker that lost them before it started its ranks looks for
    the result, too, because the stage has succeeded.
    """
    if termination.exit_code != ExitCode.OK:
        found = None if ranks.have_started.is_set() else _look_for_result(files)
        return termination if found is None else _build_success(settings, found)
    return _build_success(settings, files.read_result()) if settings.node_rank == 0 else termination


def _build_timeouts(settings: Settings, stage: Stage) -> WatchdogTimeouts:
    """Return the timeouts of the watchdog.

    The operator deletes the attempt if not all workers run within the start timeout; after it, plus slack, a worker
    without ranks counts as stalled.
    """
    slack = max(settings.stall_timeout_seconds, MIN_START_SLACK_SECONDS)
    start_seconds = stage.start_timeout_seconds and stage.start_timeout_seconds + slack
    return WatchdogTimeouts(stall_seconds=settings.stall_timeout_seconds, start_seconds=start_seconds)


def _watch_for_result(files: StageFiles, ranks: RankProcesses, on_found: Callable[[Result], None]) -> None:
    """Call `on_found` from a thread once there is a usable result, unless the ranks start before.

    Every worker checks this for itself; such a result never changes, so all of them decide alike. A worker that sees
    the shared storage late finds no peers, which may have found the result and exited, and keeps checking until it sees
    the result too. Another run's result ends a worker once worker 0 has recorded that the attempt reuses it.
    """

    def watch() -> None:
        while not ranks.have_started.wait(RESULT_POLL_SECONDS):
            found = _look_for_result(files)
            if found is not None and not ranks.have_started.is_set():
                on_found(found)

    threading.Thread(target=watch, name="result-watch", daemon=True).start()


def _look_for_result(files: StageFiles) -> Result | None:
    """Return a usable result; None if there is none, or if the storage can't be read at the moment."""
    with suppress(StorageError), translate_read_errors(files.output):
        return files.find_usable_result()
    return None


def _start_server(settings: Settings, stage: Stage, scratch: Scratch) -> None:
    """Write a first progress document and serve it, before there are ranks."""
    progress = Progress(attempt=stage.attempt, phase="starting", time=time.time())
    write_atomic(scratch.progress_file, encode(progress))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(scratch.metrics_dir)  # prometheus_client reads it at its import
    from sailvl_trainer.worker.server import start_server

    start_server(settings.metrics_port, scratch)


def _build_success(settings: Settings, result: Result) -> Termination:
    """Return the termination of a stage that has a result, which only the worker of index 0 reports."""
    return Termination(exit_code=ExitCode.OK, result=result if settings.node_rank == 0 else None)


def _describe_error(error: BaseException) -> Termination:
    """Return the termination for an error of the worker itself, not of a rank."""
    if isinstance(error, TrainerError):
        return Termination(exit_code=error.exit_code, message=str(error))
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)  # noqa: T201
    return Termination(exit_code=1, message=f"{type(error).__name__}: {error}", traceback=text)
