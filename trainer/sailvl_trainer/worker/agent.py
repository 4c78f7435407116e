"""torch's elastic agent inside the worker's own process: ranks in, the exit code of the rank to blame out.

Not torchrun, which always exits with 1, restarts in place even after a configuration error, and hands SIGTERM on as
if a neighbour had died.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from prometheus_client.multiprocess import mark_process_dead
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousHandler

from sailvl_trainer.contract import NON_RETRYABLE_EXIT_CODES, ExitCode, Stage, Termination
from sailvl_trainer.rank import bootstrap
from sailvl_trainer.rank.cgroup import count_cores, read_memory
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.settings import Settings
from sailvl_trainer.rank.telemetry import RESTARTS_VARIABLE
from sailvl_trainer.worker.ranks import Ranks
from sailvl_trainer.worker.rendezvous import REJOIN_TIMEOUT_SECONDS, build_rendezvous
from sailvl_trainer.worker.root_cause import find_root_cause, read_stack

CLOSE_SECONDS = 5
"""Between SIGTERM and SIGKILL for ranks whose neighbour has failed."""
MONITOR_SECONDS = 0.2


class Agent(LocalElasticAgent):
    """Keeps `ranks` true, starts nothing again after a final code or a stop, waits for neighbours only so long."""

    def __init__(self, spec: WorkerSpec, ranks: Ranks, scratch: Scratch, on_lost: Callable[[], None]) -> None:
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=str(scratch.elastic_dir)),
            shutdown_timeout=CLOSE_SECONDS,
            exit_barrier_timeout=60,
        )
        self._ranks, self._scratch, self._on_lost = ranks, scratch, on_lost
        self._starts = 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        timer = threading.Timer(REJOIN_TIMEOUT_SECONDS, self._on_lost)
        timer.daemon = True
        if self._ranks.has_begun.is_set():
            timer.start()
        try:
            super()._rendezvous(worker_group)
        finally:
            timer.cancel()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        os.environ[RESTARTS_VARIABLE] = str(self._starts)  # torch's own count leaves out those for a neighbour's sake
        self._starts += 1
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._ranks.begin(started.values())
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Also after a failure, when all have ended already."""
        super()._stop_workers(worker_group)
        for pid in self._ranks.end():
            mark_process_dead(pid, str(self._scratch.metrics_dir))  # type: ignore[no-untyped-call]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        for rank, failure in result.failures.items():
            if stack := read_stack(self._scratch.stacks_dir, failure.pid):
                print(f"rank {rank} died here:\n{stack}", file=sys.stderr, flush=True)  # noqa: T201
        is_final = any(failure.exitcode in NON_RETRYABLE_EXIT_CODES for failure in result.failures.values())
        if is_final or self._scratch.stop_file.exists():
            self._remaining_restarts = 0
        return result


def run_ranks(
    settings: Settings, stage: Stage, ranks: Ranks, rank_module: str, end: Callable[[Termination], None]
) -> Termination:
    """Run this worker's ranks to their end. `end`: ends the worker from another thread."""
    # else restarted ranks read the addresses of dead ones (torch 2.15, pytorch#135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"  # SIGTERM is the entry's own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // settings.processes_per_node)))
    lost = Termination(
        exit_code=ExitCode.PEER_LOST, message=f"the other workers did not come back within {REJOIN_TIMEOUT_SECONDS} s"
    )
    try:
        rendezvous = build_rendezvous(settings, stage)
        scratch = Scratch(settings.scratch)
        agent = Agent(_build_spec(settings, rendezvous, rank_module), ranks, scratch, lambda: end(lost))
        return _run(agent, rendezvous, scratch)
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        return Termination(exit_code=ExitCode.PEER_LOST, message=f"{type(error).__name__}: {error}")


def _build_spec(settings: Settings, rendezvous: RendezvousHandler, rank_module: str) -> WorkerSpec:
    return WorkerSpec(
        role="trainer",
        local_world_size=settings.processes_per_node,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        args=("-u", "-m", bootstrap.__name__, str(os.getpid()), str(Scratch(settings.scratch).stacks_dir), rank_module),
        max_restarts=settings.in_place_restarts,
        monitor_interval=MONITOR_SECONDS,
    )


def _run(agent: Agent, rendezvous: RendezvousHandler, scratch: Scratch) -> Termination:
    """The rendezvous is closed at the end, so that neighbours who would come back to it end too."""
    before = read_memory()
    try:
        result: RunResult | None = agent.run()
    finally:
        rendezvous.shutdown()
    if result is None:
        return Termination(exit_code=ExitCode.PEER_LOST, message="the other workers have left")
    if result.state == WorkerState.SUCCEEDED:
        return Termination(exit_code=ExitCode.OK)
    if result.failures:
        after = read_memory()
        return find_root_cause(
            result.failures, stacks=scratch.stacks_dir, oom=after if after.oom_kills > before.oom_kills else None
        )
    return Termination(exit_code=1, message=f"the ranks are {result.state.value}, and none has failed; see the log")
