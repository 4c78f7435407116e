"""Run the ranks of a worker with torch's elastic agent, in the worker's own process.

Called by `worker/main.py`. The workers of an attempt find each other at the rendezvous of `worker/rendezvous.py`; then
the agent of each starts `rank/bootstrap.py` once per rank. torchrun isn't used because it always
exits with code 1, restarts ranks in place even after a configuration error, and forwards SIGTERM to the ranks, which
then look like lost peers to each other.
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
from torch.distributed.elastic.rendezvous.api import RendezvousError

from sailvl_trainer.contract import NON_RETRYABLE_EXIT_CODES, ExitCode, Termination
from sailvl_trainer.rank import bootstrap
from sailvl_trainer.rank.cgroup import count_cores, read_memory
from sailvl_trainer.rank.settings import Scratch, Settings
from sailvl_trainer.rank.store import STORE_VARIABLE
from sailvl_trainer.rank.telemetry import RESTARTS_VARIABLE
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.worker.ranks import RankProcesses
from sailvl_trainer.worker.rendezvous import (
    FixedRendezvous,
    build_rendezvous,
    find_loopback_interface,
    is_on_one_machine,
)
from sailvl_trainer.worker.root_cause import find_root_cause, read_stack

REJOIN_TIMEOUT_SECONDS = 120
"""Timeout of the rendezvous after a restart in place: peers rejoin within seconds, or not at all."""
SHUTDOWN_TIMEOUT_SECONDS = 5
"""Seconds between SIGTERM and SIGKILL for the remaining ranks after one has failed."""
MONITOR_INTERVAL_SECONDS = 0.2
"""Seconds between two checks of the ranks."""


class RankAgent(LocalElasticAgent):
    """torch's agent, with four changes.

    It keeps `ranks` up to date; it passes the ranks the address of their store; it doesn't restart ranks after a
    non-retryable exit code or a stop request; and it calls `on_rejoin_timeout` if the other workers don't join the
    rendezvous again after a restart in place.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        rendezvous: FixedRendezvous,
        ranks: RankProcesses,
        scratch: Scratch,
        on_rejoin_timeout: Callable[[], None],
    ) -> None:
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=str(scratch.elastic_dir)),
            shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS,
            exit_barrier_timeout=60,
        )
        self._ranks, self._scratch, self._on_rejoin_timeout = ranks, scratch, on_rejoin_timeout
        self._fixed_rendezvous = rendezvous
        self._starts = 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        timer = threading.Timer(REJOIN_TIMEOUT_SECONDS, self._on_rejoin_timeout)
        timer.daemon = True
        if self._ranks.have_started.is_set():
            timer.start()
        try:
            super()._rendezvous(worker_group)
        finally:
            timer.cancel()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # torch's own count leaves out restarts that another worker's failure caused
        os.environ[RESTARTS_VARIABLE] = str(self._starts)
        self._starts += 1
        os.environ[STORE_VARIABLE] = encode(self._fixed_rendezvous.rank_store).decode()
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._ranks.set_running(started.values())
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Stop the ranks; torch also calls this after a failure, when all of them have ended."""
        super()._stop_workers(worker_group)
        for pid in self._ranks.set_stopped():
            mark_process_dead(pid, str(self._scratch.metrics_dir))  # type: ignore[no-untyped-call]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        for rank, failure in result.failures.items():
            if stack := read_stack(self._scratch.stacks_dir, failure.pid):
                print(f"stack of rank {rank} when it died:\n{stack}", file=sys.stderr, flush=True)  # noqa: T201
        is_final = any(failure.exitcode in NON_RETRYABLE_EXIT_CODES for failure in result.failures.values())
        if is_final or self._scratch.stop_file.exists():
            self._remaining_restarts = 0
        return result


def run_ranks(
    settings: Settings,
    ranks: RankProcesses,
    rank_module: str,
    exit_worker: Callable[[Termination], None],
) -> Termination:
    """Run the ranks to their end and return the worker's termination. `exit_worker` is called from other threads."""
    _prepare_environment(settings)
    rejoin_timeout = Termination(
        exit_code=ExitCode.PEER_LOST, message=f"peers did not rejoin within {REJOIN_TIMEOUT_SECONDS} s"
    )
    try:
        rendezvous = build_rendezvous(settings)
        scratch = Scratch(settings.scratch)
        spec = _build_spec(settings, rendezvous, rank_module)
        agent = RankAgent(spec, rendezvous, ranks, scratch, lambda: exit_worker(rejoin_timeout))
        return _run_agent(agent, rendezvous, scratch)
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        return Termination(exit_code=ExitCode.PEER_LOST, message=f"{type(error).__name__}: {error}")


def _prepare_environment(settings: Settings) -> None:
    """Set the variables that torch's agent and the ranks read."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"  # the worker itself handles SIGTERM
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # number the ranks by the workers' indexes alone
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // settings.processes_per_node)))
    loopback = find_loopback_interface()
    if loopback and is_on_one_machine(settings):
        # gloo and nccl would listen on the pod's address; overrides the user's choice, which is for several machines
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
        os.environ["NCCL_SOCKET_IFNAME"] = f"={loopback}"  # without "=" it would be a prefix


def _build_spec(settings: Settings, rendezvous: FixedRendezvous, rank_module: str) -> WorkerSpec:
    stacks_dir = Scratch(settings.scratch).stacks_dir
    return WorkerSpec(
        role="trainer",
        local_world_size=settings.processes_per_node,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        args=("-u", "-m", bootstrap.__name__, str(os.getpid()), str(stacks_dir), rank_module),
        max_restarts=settings.in_place_restarts,
        monitor_interval=MONITOR_INTERVAL_SECONDS,
    )


def _run_agent(agent: RankAgent, rendezvous: FixedRendezvous, scratch: Scratch) -> Termination:
    """Run the agent, then close the rendezvous, so that workers that try to rejoin it exit too."""
    before = read_memory()
    try:
        result: RunResult | None = agent.run()
    finally:
        rendezvous.shutdown()
    if result is None:
        return Termination(exit_code=ExitCode.PEER_LOST, message="peers closed the rendezvous")
    if result.state == WorkerState.SUCCEEDED:
        return Termination(exit_code=ExitCode.OK)
    if result.failures:
        after = read_memory()
        oom = after if after.oom_kills > before.oom_kills else None
        return find_root_cause(result.failures, stacks_dir=scratch.stacks_dir, oom=oom)
    return Termination(exit_code=1, message=f"the ranks are {result.state.value}, but none has failed; see the log")
