"""torch's elastic agent inside the worker's own process: ranks in, the exit code of the rank to blame out.

Not torchrun, which always exits with 1, restarts in place even after a configuration error, and hands SIGTERM on as
if a neighbour had died.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api

from sailvl_trainer.contract import FINAL_CODES, ExitCode, Stage, Termination
from sailvl_trainer.runtime.documents import decode
from sailvl_trainer.runtime.settings import Settings

JOIN_SECONDS = 86_400
"""Pods may be minutes apart: pulls, scale-up. The operator's startTimeoutSeconds is the one that ends it."""


class Agent(LocalElasticAgent):
    """Knows its ranks' pids, and starts nothing again after a final code."""

    on_start: Callable[[], None] = staticmethod(lambda: None)
    pids: list[int] = []  # noqa: RUF012  # one agent a process

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        type(self).on_start()
        started: dict[int, Any] = super()._start_workers(worker_group)
        type(self).pids = list(self._pcontext.pids().values()) if self._pcontext is not None else []
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_CODES for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def run_ranks(settings: Settings, stage: Stage, rank_module: str, on_start: Callable[[], None]) -> Termination:
    """Run this worker's ranks to their end. `on_start`: called whenever they are started."""
    # else restarted ranks read the addresses of dead ones (torch 2.15, pytorch#135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.processes_per_node)))
    if settings.node_rank:
        _await_store(settings)
    Agent.on_start = staticmethod(on_start)
    setattr(api, "LocalElasticAgent", Agent)  # noqa: B010  # the launcher's one seam
    try:
        api.launch_agent(_build_config(settings, stage), sys.executable, ["-u", "-m", rank_module])
    except ChildFailedError as error:
        return _blame(error.failures)
    except RendezvousError as error:
        return Termination(exit_code=ExitCode.PEER_LOST, message=f"{type(error).__name__}: {error}")
    return Termination(exit_code=ExitCode.OK)


def _build_config(settings: Settings, stage: Stage) -> api.LaunchConfig:
    return api.LaunchConfig(
        min_nodes=settings.nodes,
        max_nodes=settings.nodes,
        nproc_per_node=settings.processes_per_node,
        run_id=f"{stage.namespace}.{stage.run}.{stage.stage}.{stage.attempt}",
        role="trainer",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{settings.rendezvous_host}:{settings.rendezvous_port}",
        rdzv_configs={"join_timeout": JOIN_SECONDS, "is_host": str(settings.node_rank == 0).lower()},
        max_restarts=settings.in_place_restarts,
        monitor_interval=0.2,
        signals_to_handle="SIGINT",
        logs_specs=DefaultLogsSpecs(log_dir=str(settings.scratch / "elastic")),
    )


def _await_store(settings: Settings) -> None:
    """Worker 0 may be minutes behind; torch itself gives up after two."""
    while True:
        try:
            socket.create_connection((settings.rendezvous_host, settings.rendezvous_port), 2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return


def _blame(failures: dict[int, ProcessFailure]) -> Termination:
    """The rank whose end made the others end: its own words, if it left any."""
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    words = failure.message if isinstance(failure.message, str) else json.dumps(failure.message)
    try:
        return decode(Termination, words)
    except ValueError:
        return Termination(exit_code=code, rank=rank, message=words)


def _order(failure: ProcessFailure) -> tuple[int, int]:
    """A final code, then any other, then a lost peer, then what the agent itself ended."""
    code = failure.exitcode
    group = 0 if code in FINAL_CODES else 2 if code == ExitCode.PEER_LOST else 3 if code == -signal.SIGTERM else 1
    return group, failure.timestamp
