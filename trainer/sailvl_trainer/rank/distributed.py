"""The process group of a stage's ranks: gloo for what lies in memory, nccl for what lies on GPUs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Of a collective. A neighbour that dies breaks the connection at once; this is for one that hangs."""


def start_process_group(device: torch.device) -> None:
    """Join the group that the environment of torch's elastic agent describes; alone without one."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)


def get_default_store() -> Store:
    """The group's key-value store; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def broadcast_object(value: T | None) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]  # rank 0 gave one


def all_gather_object(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are set now


def sum_over_ranks(*values: float) -> tuple[float, ...]:
    """Sums of numbers over the ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())
