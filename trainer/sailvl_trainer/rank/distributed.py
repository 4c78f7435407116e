"""The process group of a stage's ranks: gloo for tensors on the CPU, nccl for tensors on GPUs.

Every rank has to call the collectives below, in the same order; they run on the CPU.
"""

from __future__ import annotations

import os
import pickle
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from sailvl_trainer.rank.store import STORE_VARIABLE, StoreAddress, open_store
from sailvl_trainer.storage.codec import decode

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time after which a collective fails because a rank hangs; a rank that dies breaks the connection at once."""


def start_process_group(device: torch.device) -> None:
    """Join the process group that the worker's agent set in the environment, or a group of one without an agent."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)  # DeepSpeed reads them
    forbid_pickled_objects()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = 0, 1
    store: Store = HashStore()
    if STORE_VARIABLE in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = open_store(decode(StoreAddress, os.environ[STORE_VARIABLE]), world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists, tuples, dicts and sets, and refuses everything else, which could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse a class or function that the pickle names. Raises UnpicklingError."""
        raise pickle.UnpicklingError(f"another rank sent {module}.{name}, but only plain values are accepted")


def forbid_pickled_objects() -> None:
    """Have torch's object collectives refuse all but plain values from other ranks, in this process.

    The trainer uses none of them, since `rank/collectives.py` replaces them. But torch and DeepSpeed call them in some
    configurations, and gloo's connections aren't authenticated: a process that poses as a rank would run code here.
    """
    # c10d's _tensor_to_object, which all of them call, reads this module attribute
    distributed_c10d._unpickler = PlainUnpickler


def get_default_store() -> Store:
    """Return the key-value store of the process group, for which torch has no public name."""
    return distributed_c10d._get_default_store()


def sum_over_ranks(*values: float) -> tuple[float, ...]:
    """Return the sum of each value over all ranks, computed in float64, on every rank."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())
