"""The sockets on which processes of this machine listen, read from /proc as `ss -ltnp` does."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""


def find_listeners(pids: list[int]) -> set[tuple[str, int]]:
    """Return address and port of each socket on which one of the processes listens."""
    owned = {inode for pid in pids for inode in _find_sockets(pid)}
    return {(address, port) for address, port, inode in _read_listeners() if inode in owned}


def find_descendants(pid: int) -> list[int]:
    """Return a process and all that it has started, and those that these have started."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def _find_sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets."""
    targets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            targets.add(os.readlink(descriptor))
    return {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}


def _read_listeners() -> list[tuple[str, int, str]]:
    """Return address, port and inode of every listening TCP socket of this network namespace."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, port = fields[1].split(":")
                found.append((_parse_address(address), int(port, 16), fields[9]))
    return found


def _parse_address(text: str) -> str:
    """Return an address from groups of eight hexadecimal digits, each in the machine's byte order."""
    groups = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    family = socket.AF_INET if len(groups) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(groups)}I", *groups)).removeprefix("::ffff:")
