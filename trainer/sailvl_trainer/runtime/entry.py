"""PID 1 of a worker: serves metrics and progress, runs the ranks, ends with the code and words of the rank to blame.

torch is imported late: it takes seconds, and until a handler is set PID 1 ignores SIGTERM.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import ExitCode, Result, Stage, Termination
from sailvl_trainer.runtime.documents import read_stage
from sailvl_trainer.runtime.errors import TrainerError
from sailvl_trainer.runtime.files import StageFiles
from sailvl_trainer.runtime.preemption import STOP_FILE
from sailvl_trainer.runtime.settings import Settings, read_settings
from sailvl_trainer.runtime.termination import write_termination

STALE_FILES = (STOP_FILE, "progress.json")


def main(rank_module: str = "sailvl_trainer.rank") -> NoReturn:
    """A worker from its environment to its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.PREEMPTED))
    try:
        settings = read_settings(os.environ)
    except TrainerError as error:
        sys.exit(f"{error}")
    try:
        stage = read_stage(settings.stage_file)
        metrics = _clean_scratch(settings)
        result = StageFiles(stage).find_result()
    except (TrainerError, OSError, ValueError) as error:
        code = error.exit_code if isinstance(error, TrainerError) else 1
        _end(settings, Termination(exit_code=code, message=f"{type(error).__name__}: {error}"))
    if result is not None:
        _end(settings, _succeeded(settings, result))
    _end(settings, _work(settings, stage, metrics, rank_module))


def _work(settings: Settings, stage: Stage, metrics: Path, rank_module: str) -> Termination:
    started = threading.Event()
    _handle_sigterm(settings, started)
    from sailvl_trainer.runtime import agent, server, watchdog

    server.start_server(settings.metrics_port, settings.scratch, metrics)
    watchdog.start_watchdog(
        settings.scratch,
        settings.stall_seconds,
        lambda: agent.Agent.pids,
        lambda words: _end(settings, Termination(exit_code=ExitCode.STALLED, message=words)),
    )
    termination = agent.run_ranks(settings, stage, rank_module, started.set)
    if termination.exit_code == ExitCode.OK:
        return _succeeded(settings, StageFiles(stage).read_result())
    return termination


def _succeeded(settings: Settings, result: Result) -> Termination:
    return Termination(exit_code=ExitCode.OK, result=result if settings.node_rank == 0 else None)


def _clean_scratch(settings: Settings) -> Path:
    """An empty folder for the ranks' metrics; what a predecessor left in the scratch goes."""
    settings.scratch.mkdir(parents=True, exist_ok=True)
    for name in STALE_FILES:
        (settings.scratch / name).unlink(missing_ok=True)
    metrics = settings.scratch / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    return metrics


def _handle_sigterm(settings: Settings, started: threading.Event) -> None:
    """In a thread, since the main one may sit in a C++ wait: ask the ranks to stop, and wait for the grace.

    SIGTERM is not handed on: a rank takes it as a neighbour's death.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        if not started.is_set():
            _end(settings, Termination(exit_code=ExitCode.PREEMPTED, message="stopped before its ranks began"))
        (settings.scratch / STOP_FILE).touch()
        time.sleep(settings.grace_seconds)
        words = f"no checkpoint within {settings.grace_seconds} s of SIGTERM; the steps since the last one are lost"
        _end(settings, Termination(exit_code=ExitCode.TERMINATED, message=words))

    threading.Thread(target=watch, name="sigterm", daemon=True).start()


def _end(settings: Settings, termination: Termination) -> NoReturn:
    """Say it and go: ranks that still live are ended with this worker's process group."""
    if termination.exit_code:
        print(f"{termination.message}\n{termination.traceback}", file=sys.stderr, flush=True)  # noqa: T201
    write_termination(settings.termination_log, termination)
    _kill_ranks()
    os._exit(termination.exit_code)


def _kill_ranks() -> None:
    module = sys.modules.get("sailvl_trainer.runtime.agent")
    for pid in module.Agent.pids if module is not None else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
