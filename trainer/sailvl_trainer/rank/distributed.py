"""The process group of a stage's ranks: gloo for tensors on the CPU, nccl for tensors on GPUs.

Every rank has to call the collectives below, in the same order; they run on the CPU.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time after which a collective fails because a rank hangs; a rank that dies breaks the connection at once."""


def start_process_group(device: torch.device) -> None:
    """Join the process group that torch's elastic agent set in the environment, or a group of one without an agent."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)


def get_default_store() -> Store:
    """Return the key-value store of the process group, for which torch has no public name."""
    return dist.distributed_c10d._get_default_store()


def broadcast_object(value: T | None) -> T:
    """Return rank 0's value on every rank; the other ranks pass None."""
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]  # type: ignore[return-value]  # rank 0 passed a value


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every rank passed a value


def sum_over_ranks(*values: float) -> tuple[float, ...]:
    """Return the sum of each value over all ranks, computed in float64, on every rank."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())
