"""Memory and CPU cores of the worker's container, read from its control group (version 1 or 2).

The worker compares the count of OOM kills before and after its ranks ran, and divides its cores among them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.storage.files import format_bytes

MOUNT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
CPU_MAX = MOUNT / "cpu.max"
"""Version 2 only: `QUOTA PERIOD` in microseconds, or `max PERIOD` without a limit."""
NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 if there is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUsage:
    """Memory of a control group."""

    peak_bytes: int | None = None
    """Largest usage so far; None if it is unknown."""
    limit_bytes: int | None = None
    """Limit of the group; None if it has none or it is unknown."""
    oom_kills: int = 0
    """Number of processes of the group that the kernel has ever killed because memory ran out."""

    def describe(self) -> str:
        """Return a text such as `peak 3.9 GiB of 4.0 GiB`."""
        peak = "peak unknown" if self.peak_bytes is None else f"peak {format_bytes(self.peak_bytes)}"
        return f"{peak}, no limit" if self.limit_bytes is None else f"{peak} of {format_bytes(self.limit_bytes)}"


def read_memory(mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> MemoryUsage:
    """Return the memory of this process's control group, which in a container is the container's.

    Version 2 is preferred; version 1 is read if the memory controller is not in version 2.
    """
    groups = dict(_read_groups(own_groups))
    for root, path in ((mount, groups.get("", "/")), (mount / "memory", groups.get("memory", "/"))):
        for folder in (root / path.strip("/"), root):
            if (folder / "memory.max").exists():
                peak = "memory.peak" if (folder / "memory.peak").exists() else "memory.current"
                return _read_files(folder, peak, "memory.max", "memory.events")
            if (folder / "memory.limit_in_bytes").exists():
                return _read_files(folder, "memory.max_usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control")
    return MemoryUsage()


def read_memory_limit(mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> int:
    """Return the number of bytes that this container may use: its limit, or else the memory of the machine."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = read_memory(mount, own_groups).limit_bytes
    return installed if limit is None else min(limit, installed)


def count_cores(cpu_max: Path = CPU_MAX) -> int:
    """Return the number of cores that the process may use, at least 1: its CPU affinity or, if less, its quota."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = cpu_max.read_text().split() if cpu_max.exists() else ("max", "1")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def _read_groups(own_groups: Path) -> list[tuple[str, str]]:
    """Return (controller, path of the group); the controller of version 2 is an empty string."""
    lines = own_groups.read_text().splitlines() if own_groups.exists() else []
    entries = [line.split(":", 2) for line in lines]
    return [(name, path) for _, names, path in entries for name in names.split(",")]


def _read_files(folder: Path, peak: str, limit: str, events: str) -> MemoryUsage:
    limit_bytes = _read_number(folder / limit)
    kills = re.search(r"^oom_kill (\d+)$", (folder / events).read_text(), re.MULTILINE)
    return MemoryUsage(
        peak_bytes=_read_number(folder / peak),
        limit_bytes=None if limit_bytes is None or limit_bytes >= NO_LIMIT else limit_bytes,
        oom_kills=int(kills[1]) if kills else 0,
    )


def _read_number(path: Path) -> int | None:
    """Return the number in a file; None for `max`, or if this kernel doesn't have the file."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
