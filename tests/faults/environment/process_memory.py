"""A process's memory, changed from outside: NaN written into it, as by broken hardware, and a limit that it reaches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.faults.environment.host import find_cgroup

ROTARY_BASE, HEAD_WIDTH = 10_000.0, 32
"""Rotary position embedding of the tiny language model."""
REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ \S+\s*(\S*)$")
LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")
USAGE_FILES = ("memory.usage_in_bytes", "memory.current")
HEADROOM_BYTES = 32 << 20
"""Bytes by which a container may grow under its new limit."""
ALLOCATE_FOREVER = """
import time
held = []
while True:
    held.append(bytearray(b"x") * (8 << 20))
    time.sleep(0.02)
"""


def write_nan(pid: int) -> int:
    """Overwrite the rotary frequencies of the language model with NaN and return how often they were found."""
    powers = torch.arange(0, HEAD_WIDTH, 2, dtype=torch.int64).float() / HEAD_WIDTH
    wanted = (1.0 / (ROTARY_BASE**powers)).numpy().tobytes()
    nan = torch.full((HEAD_WIDTH // 2,), float("nan")).numpy().tobytes()
    found = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for start, end in list_regions(pid):
            content = read_region(memory.fileno(), start, end)
            for match in re.finditer(re.escape(wanted), content):
                os.pwrite(memory.fileno(), nan, start + match.start())
                found += 1
    return found


def list_regions(pid: int) -> list[tuple[int, int]]:
    """Return start and end of a process's writable private memory regions."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [match for line in lines if (match := REGION.match(line)) and match[3] in ("", "[heap]")]
    return [(int(match[1], 16), int(match[2], 16)) for match in found]


def read_region(handle: int, start: int, end: int) -> bytes:
    """Return a region's bytes, or nothing if it no longer exists."""
    try:
        return os.pread(handle, end - start, start)
    except OSError:
        return b""


@contextmanager
def exhaust(container: str, victim: int) -> Iterator[None]:
    """Lower a container's memory limit to its usage and allocate more in it until the kernel has killed the victim.

    The kernel chooses the process with the highest OOM score, which the victim is given.
    """
    group = find_cgroup(container, "memory")
    limit = next(group / name for name in LIMIT_FILES if (group / name).exists())
    usage = next(group / name for name in USAGE_FILES if (group / name).exists())
    Path(f"/proc/{victim}/oom_score_adj").write_text("1000")
    limit.write_text(str(int(usage.read_text()) + HEADROOM_BYTES))
    allocator = subprocess.Popen([sys.executable, "-c", ALLOCATE_FOREVER], stdin=subprocess.DEVNULL)
    try:
        (group / "cgroup.procs").write_text(str(allocator.pid))
        wait_for_exit(victim)
    finally:
        allocator.kill()
        allocator.wait()
    yield


def wait_for_exit(pid: int, seconds: float = 60) -> None:
    """Wait until a process has ended."""
    until = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < until, f"process {pid} is still alive"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
