"""How much memory the worker's container used and may use, by its control group: the kernel's words for an OOM kill."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.storage.errors import format_bytes

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
CPU_MAX = MOUNT / "cpu.max"
NO_LIMIT = 1 << 60
"""cgroup v1 writes a number near 2**63 where there is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """None: not known, or no limit."""

    peak: int | None = None
    limit: int | None = None
    kills: int = 0
    """Processes of the group that the kernel has killed for want of memory, ever."""

    def describe(self) -> str:
        """Return peak and limit as text, for example `peak 3.9 GiB of 4.0 GiB`."""
        peak = "peak not known" if self.peak is None else f"peak {format_bytes(self.peak)}"
        return f"{peak}, no limit of its own" if self.limit is None else f"{peak} of {format_bytes(self.limit)}"


def read_memory(mount: Path = MOUNT, own: Path = OWN) -> Memory:
    """Of this process's group; in a container it is the container's. Version 2 where it has memory, else version 1."""
    groups = dict(_read_groups(own))
    for root, path in ((mount, groups.get("", "/")), (mount / "memory", groups.get("memory", "/"))):
        for folder in (root / path.strip("/"), root):
            if (folder / "memory.max").exists():
                peak = "memory.peak" if (folder / "memory.peak").exists() else "memory.current"
                return _read(folder, peak, "memory.max", "memory.events")
            if (folder / "memory.limit_in_bytes").exists():
                return _read(folder, "memory.max_usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control")
    return Memory()


def _read_groups(own: Path) -> list[tuple[str, str]]:
    """Controller, "" for all of version 2, to the group's path."""
    lines = own.read_text().splitlines() if own.exists() else []
    entries = [line.split(":", 2) for line in lines]
    return [(name, path) for _, names, path in entries for name in names.split(",")]


def _read(folder: Path, peak: str, limit: str, events: str) -> Memory:
    most = _number(folder / limit)
    counted = re.search(r"^oom_kill (\d+)$", (folder / events).read_text(), re.MULTILINE)
    return Memory(
        peak=_number(folder / peak),
        limit=None if most is None or most >= NO_LIMIT else most,
        kills=int(counted[1]) if counted else 0,
    )


def _number(path: Path) -> int | None:
    """None for `max`, and for a file that this kernel hasn't."""
    words = path.read_text().strip() if path.exists() else ""
    return int(words) if words.isdigit() else None


def count_cores(cpu_max: Path = CPU_MAX) -> int:
    """At least 1: those that the process may be scheduled on, or the cgroup's quota where that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = cpu_max.read_text().split() if cpu_max.exists() else ("max", "1")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
