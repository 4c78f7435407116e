"""How many processor cores this worker may use: fewer than the machine has, in a container with a limit."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Of cgroup v2: `QUOTA PERIOD` in microseconds, or `max PERIOD`."""


def count_cores(cpu_max: Path = CPU_MAX) -> int:
    """At least 1: those that the process may be scheduled on, or the cgroup's quota where that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = cpu_max.read_text().split() if cpu_max.exists() else ("max", "1")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
