"""Units of work dealt to the ranks as they come for more; a unit that is done is done for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import gather


def share(context: Context, name: str, units: int, is_done: Callable[[int], bool], do: Callable[[int], None]) -> None:
    """Carry out all units over all ranks, and wait for the last; a killed run does only those again that were open."""
    counter = f"curate/{name}"
    while (unit := context.store.add(counter, 1) - 1) < units:
        if not is_done(unit):
            do(unit)
        context.telemetry.update()
    gather(None)


@contextmanager
def first_alone(context: Context) -> Iterator[bool]:
    """A block whose work the first rank does while the others wait at its end."""
    yield context.is_first
    dist.barrier()


def part_path(folder: Path, unit: int) -> Path:
    """Where a unit of verification leaves its rows."""
    return folder / "rows" / f"{unit:06d}.parquet"
