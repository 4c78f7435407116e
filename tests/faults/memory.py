"""A process's memory from outside: numbers spoilt in it, as by a broken chip, and a limit that it comes to."""

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

from tests.faults.host import find_group

ROTARY_BASE, HEAD_WIDTH = 10_000.0, 32
"""Of the tiny language model's positions."""
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ \S+\s*(\S*)$")
LIMITS = ("memory.limit_in_bytes", "memory.max")
USAGES = ("memory.usage_in_bytes", "memory.current")
ROOM = 32 << 20
"""Bytes that a container may grow by under its new limit."""
GREEDY = """
import time
held = []
while True:
    held.append(bytearray(b"x") * (8 << 20))
    time.sleep(0.02)
"""


def spoil(pid: int) -> int:
    """Turn the frequencies of the language model's positions into NaN; how often they were found."""
    powers = torch.arange(0, HEAD_WIDTH, 2, dtype=torch.int64).float() / HEAD_WIDTH
    wanted = (1.0 / (ROTARY_BASE**powers)).numpy().tobytes()
    nan = torch.full((HEAD_WIDTH // 2,), float("nan")).numpy().tobytes()
    found = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for start, end in list_regions(pid):
            content = read(memory.fileno(), start, end)
            for match in re.finditer(re.escape(wanted), content):
                os.pwrite(memory.fileno(), nan, start + match.start())
                found += 1
    return found


def list_regions(pid: int) -> list[tuple[int, int]]:
    """Where a process keeps data of its own."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [match for line in lines if (match := LINE.match(line)) and match[3] in ("", "[heap]")]
    return [(int(match[1], 16), int(match[2], 16)) for match in found]


def read(handle: int, start: int, end: int) -> bytes:
    """Empty where the region has gone meanwhile."""
    try:
        return os.pread(handle, end - start, start)
    except OSError:
        return b""


@contextmanager
def squeezed(container: str, victim: int) -> Iterator[None]:
    """The container's limit lowered to what it uses, and a process in it that asks for more until the victim is dead.

    The kernel chooses whom it kills by their scores: the victim has the worst one.
    """
    group = find_group(container, "memory")
    limit = next(group / name for name in LIMITS if (group / name).exists())
    usage = next(group / name for name in USAGES if (group / name).exists())
    Path(f"/proc/{victim}/oom_score_adj").write_text("1000")
    limit.write_text(str(int(usage.read_text()) + ROOM))
    hog = subprocess.Popen([sys.executable, "-c", GREEDY], stdin=subprocess.DEVNULL)
    try:
        (group / "cgroup.procs").write_text(str(hog.pid))
        await_end(victim)
    finally:
        hog.kill()
        hog.wait()
    yield


def await_end(pid: int, seconds: float = 60) -> None:
    """Until a process is dead."""
    until = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < until, f"process {pid} is still alive"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
