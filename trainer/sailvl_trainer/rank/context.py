"""The context of a stage on one rank: its config, files, process group, telemetry and stop requests.

`rank/main.py` builds it and passes it to the stage's `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sailvl_trainer.contract import Stage
from sailvl_trainer.rank.cgroup import read_memory_limit
from sailvl_trainer.rank.distributed import get_default_store, start_process_group, sum_over_ranks
from sailvl_trainer.rank.settings import Scratch
from sailvl_trainer.rank.telemetry import Telemetry
from sailvl_trainer.storage.layout import StageFiles


class Preemption:
    """Stop requests: at SIGTERM a worker creates its stop file, and the ranks agree on the step to stop at."""

    def __init__(self, scratch: Scratch) -> None:
        self._stop_file = scratch.stop_file

    @property
    def is_requested_locally(self) -> bool:
        """Whether this rank's own worker was asked to stop."""
        return self._stop_file.exists()

    def should_stop(self) -> bool:
        """Return whether any worker was asked to stop. A collective: every rank has to call it at the same step."""
        return sum_over_ranks(float(self.is_requested_locally))[0] > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Everything that a stage needs to run on one rank."""

    stage: Stage
    """The stage config."""
    files: StageFiles
    """The stage's directories on the shared storage."""
    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks of the attempt."""
    local_rank: int
    """Rank within the worker."""
    device: torch.device
    """The rank's GPU, or the CPU."""
    telemetry: Telemetry
    """Progress and metrics of this rank."""
    preemption: Preemption
    """Whether the attempt was asked to stop."""
    store: Store
    """Key-value store shared by all ranks; each use needs its own key prefix."""
    memory_bytes: int | None = None
    """This rank's part of the worker's memory; None: unknown."""

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, which does the work that is done once per attempt."""
        return self.rank == 0


def build_context(
    stage: Stage,
    *,
    device: torch.device,
    rank: int,
    local_rank: int,
    scratch: Scratch,
    processes_per_node: int = 1,
) -> Context:
    """Join the process group and return this rank's context."""
    telemetry = Telemetry(stage, scratch.progress_path(local_rank), rank=rank)
    start_process_group(device)
    telemetry.update()
    return Context(
        stage=stage,
        files=StageFiles(stage),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        telemetry=telemetry,
        preemption=Preemption(scratch),
        store=get_default_store(),
        memory_bytes=read_memory_limit() // processes_per_node,
    )


def build_single_process_context(stage: Stage, *, scratch: Path, device: torch.device | None = None) -> Context:
    """Return a context without a worker, for tests and tools; joins a process group of one if there is none yet."""
    scratch.mkdir(parents=True, exist_ok=True)
    device = device or torch.device("cpu")
    if not dist.is_initialized():
        start_process_group(device)
    return Context(
        stage=stage,
        files=StageFiles(stage),
        rank=0,
        world_size=1,
        local_rank=0,
        device=device,
        telemetry=Telemetry(stage, scratch / "progress.json"),
        preemption=Preemption(Scratch(scratch)),
        store=get_default_store(),
    )
