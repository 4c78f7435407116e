"""Exchange small values between the ranks of a stage, as JSON in tensors on the CPU.

torch's own object collectives unpickle what another rank sends, so a process that poses as a rank could run code in
all others. Here a value is decoded into the type that the caller names, and its size is bounded. Every rank has to
call these functions in the same order.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from sailvl_trainer.errors import PeerLost
from sailvl_trainer.storage.codec import decode, encode

T = TypeVar("T")

MAX_VALUE_BYTES = 1 << 28
"""Longest encoded value of a rank. The largest values, an evaluation's answers, have some megabytes."""
_ADVICE = "check that all workers run the same image, and that a NetworkPolicy keeps other pods from their ports"


def broadcast_value(type_: type[T], value: T | None) -> T:
    """Return rank 0's value, of a type that JSON can represent, on every rank; the other ranks pass None.

    Raises PeerLost if what arrives isn't a value of the type, ValueError on rank 0 if its own value is too long.
    """
    if dist.get_rank() == 0:
        data = _encode(value)
        dist.broadcast(torch.tensor([len(data)]), src=0)
        dist.broadcast(data, src=0)
        return _decode(type_, data, rank=0)
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, src=0)
    data = torch.empty(_check_size(int(size), rank=0), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return _decode(type_, data, rank=0)


def all_gather_values(type_: type[T], value: T) -> list[T]:
    """Return the values of all ranks, of a type that JSON can represent, in the order of the ranks, on every rank.

    Raises PeerLost if what arrives isn't a value of the type, ValueError if this rank's own value is too long.
    """
    own = _encode(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    lengths = [_check_size(int(size), rank=rank) for rank, size in enumerate(sizes)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [
        _decode(type_, data[:length], rank=rank)
        for rank, (data, length) in enumerate(zip(gathered, lengths, strict=True))
    ]


def _encode(value: object) -> torch.Tensor:
    data = encode(value)
    if len(data) > MAX_VALUE_BYTES:
        raise ValueError(f"a value of {len(data)} bytes is too long for the other ranks; at most {MAX_VALUE_BYTES}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _check_size(size: int, *, rank: int) -> int:
    """Return the announced size of a rank's value in bytes, before a buffer is allocated for it."""
    if not 0 < size <= MAX_VALUE_BYTES:
        raise PeerLost(f"rank {rank} announced a value of {size} bytes; {_ADVICE}")
    return size


def _decode(type_: type[T], data: torch.Tensor, *, rank: int) -> T:
    try:
        return decode(type_, data.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise PeerLost(f"rank {rank} sent a value that can't be read ({error}); {_ADVICE}") from error
