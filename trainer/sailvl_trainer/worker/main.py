"""PID 1 of a worker: serves metrics and progress, runs the ranks, ends with the code and words of the rank to blame.

torch is imported late, by the agent: it takes seconds, and until a handler is set PID 1 ignores SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import MutableMapping
from typing import NoReturn

from sailvl_trainer.contract import ExitCode, Progress, Result, Stage, Termination
from sailvl_trainer.errors import TrainerError
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.settings import Settings, read_settings, read_termination_log
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode, read_stage
from sailvl_trainer.storage.errors import translate_storage_errors
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.exit import Exit
from sailvl_trainer.worker.ranks import Ranks
from sailvl_trainer.worker.result_watch import watch_for_result
from sailvl_trainer.worker.signals import handle_sigterm
from sailvl_trainer.worker.watchdog import Limits, start_watchdog

MEETING_SECONDS = 300
"""For workers that all run to load their programs and to find each other, at least."""


def main(rank_module: str = "sailvl_trainer.rank.main") -> NoReturn:
    """A worker from its environment to its exit code. `rank_module`: run as the main of every rank."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    prepare_environment(os.environ)
    ranks = Ranks()
    end = Exit(read_termination_log(os.environ), ranks)
    try:
        termination = _work(read_settings(os.environ), ranks, rank_module, end)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the operator has to be told
        termination = _describe(error)
    end(termination)


def _work(settings: Settings, ranks: Ranks, rank_module: str, end: Exit) -> Termination:
    scratch = Scratch(settings.scratch)
    scratch.prepare()
    end.progress_file = scratch.progress_file
    handle_sigterm(ranks, scratch, settings.grace_seconds, end)
    stage = read_stage(settings.stage_file)
    start_watchdog(ranks, scratch, limits=_limits(settings, stage), nodes=settings.nodes, end=end)
    files = StageFiles(stage)
    with translate_storage_errors(files.output):
        found = files.find_result()
    if found is not None:
        return _succeeded(settings, found)
    watch_for_result(files, ranks, lambda result: end(_succeeded(settings, result)))
    _serve(settings, stage, scratch)
    from sailvl_trainer.worker.agent import run_ranks

    termination = run_ranks(settings, stage, ranks, rank_module, end)
    if termination.exit_code == ExitCode.OK and settings.node_rank == 0:
        return _succeeded(settings, files.read_result())
    return termination


def _limits(settings: Settings, stage: Stage) -> Limits:
    """All workers run within the start timeout, or the operator ends them; from then on nothing is left to wait for."""
    slack = max(settings.stall_timeout_seconds, MEETING_SECONDS)
    wait = stage.start_timeout_seconds and stage.start_timeout_seconds + slack
    return Limits(stall_timeout_seconds=settings.stall_timeout_seconds, meet_seconds=wait)


def _serve(settings: Settings, stage: Stage, scratch: Scratch) -> None:
    """Before the ranks are there: a document that says so, and the folder where they will count."""
    progress = Progress(attempt=stage.attempt, phase="starting", time=time.time())
    write_atomic(scratch.progress_file, encode(progress))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(scratch.metrics_dir)  # read by prometheus_client when it is imported
    from sailvl_trainer.worker.server import start_server

    start_server(settings.metrics_port, scratch)


def _succeeded(settings: Settings, result: Result) -> Termination:
    return Termination(exit_code=ExitCode.OK, result=result if settings.node_rank == 0 else None)


def _describe(error: BaseException) -> Termination:
    """Of the entry itself, not of a rank."""
    if isinstance(error, TrainerError):
        return Termination(exit_code=error.exit_code, message=str(error))
    words = "".join(traceback.format_exception(error))
    print(words, file=sys.stderr, flush=True)  # noqa: T201
    return Termination(exit_code=1, message=f"{type(error).__name__}: {error}", traceback=words)


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Fill in what libraries ask for: a home that can be written to, a user's name, no progress bars in logs. What is
    set stays."""
    if not os.access(environment.get("HOME") or "/", os.W_OK):
        environment["HOME"] = "/tmp"
    environment.setdefault("USER", "sailvl")
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
