"""Limits of the connections to a worker's HTTP server, to which any process that reaches its port can connect.

A connection that comes when there are too many replaces the oldest one, instead of being refused: the operator and
Prometheus are answered within milliseconds, so that the oldest connections are those of clients that hold them open.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_ADDRESS = 4
"""The operator, Prometheus and the kubelet each need one at a time."""
MAX_SECONDS = 10.0
"""Longest time for a request and its response."""


@dataclass(kw_only=True, slots=True)
class _Connection:
    address: str
    opened: float
    is_closed: bool = False
    """Whether it was shut down; its thread may need a moment to end."""


class OpenConnections:
    """The connections that are served, in the order in which they were opened. Thread-safe."""

    def __init__(self) -> None:
        self._connections: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: socket.socket, address: str) -> bool:
        """Add a connection, and close an old one if there are too many, of this address or of all.

        Return whether the new one may be served: not while too many threads of closed connections haven't ended yet.
        """
        with self._lock:
            if len(self._connections) >= 2 * MAX_CONNECTIONS:
                return False
            counts = Counter(found.address for found in self._connections.values() if not found.is_closed)
            if counts[address] >= MAX_CONNECTIONS_PER_ADDRESS:
                self._close_oldest(address)
            elif counts.total() >= MAX_CONNECTIONS:
                self._close_oldest(counts.most_common(1)[0][0])
            self._connections[connection] = _Connection(address=address, opened=time.monotonic())
        return True

    def remove(self, connection: socket.socket) -> None:
        """Remove a connection whose thread ends."""
        with self._lock:
            self._connections.pop(connection, None)

    def close_expired(self) -> None:
        """Close the connections that have been open for longer than MAX_SECONDS."""
        with self._lock:
            oldest = time.monotonic() - MAX_SECONDS
            for connection, found in self._connections.items():
                if found.opened < oldest and not found.is_closed:
                    _close(connection, found)

    def _close_oldest(self, address: str) -> None:
        for connection, found in self._connections.items():
            if found.address == address and not found.is_closed:
                return _close(connection, found)
        return None


def _close(connection: socket.socket, found: _Connection) -> None:
    """Shut a connection down, which ends the read or write that its thread waits for."""
    found.is_closed = True
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
