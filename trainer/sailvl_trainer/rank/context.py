"""Everything that a stage is handed: its document, its files, its place among the ranks, and how to tell of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sailvl_trainer.contract import Stage
from sailvl_trainer.rank.distributed import get_default_store, start_process_group
from sailvl_trainer.rank.preemption import Preemption
from sailvl_trainer.rank.scratch import Scratch
from sailvl_trainer.rank.telemetry import Telemetry
from sailvl_trainer.storage.layout import StageFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    stage: Stage
    files: StageFiles
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    telemetry: Telemetry
    preemption: Preemption
    store: Store
    """Shared by all ranks; give every use a prefix of its own."""

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0


def build_context(stage: Stage, *, device: torch.device, rank: int, local_rank: int, scratch: Scratch) -> Context:
    """Join the group and gather a rank's tools."""
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
    )


def build_single_process_context(stage: Stage, *, scratch: Path, device: torch.device | None = None) -> Context:
    """A stage alone in this process, without a worker around it: for tests and tools. Joins a group of one, once."""
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
