"""The peak memory of a part of a program, measured by this process about itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True, slots=True)
class MeasuredPeak:
    """Memory that a block took at its peak, beyond what the process had before."""

    peak_bytes: int = 0


@contextmanager
def measure_peak() -> Iterator[MeasuredPeak]:
    """Measure the peak of the resident memory during the block; it is known when the block ends.

    Free memory is first returned to the system, or the block would reuse what earlier ones have left in the heap.
    """
    measured = MeasuredPeak()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _read_status("VmRSS")
    yield measured
    measured.peak_bytes = _read_status("VmHWM") - before


def _read_status(name: str) -> int:
    """Return a size from the status of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10
