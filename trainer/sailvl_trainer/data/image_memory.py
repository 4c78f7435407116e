"""Memory for images: one budget in bytes that all threads of a rank share, so that hostile images can't exhaust it.

An image within the pixel limit can take gigabytes while it is decoded, in every thread at once. So a thread reserves
the peak of an image, estimated from its header, before it decodes the image, and waits while other threads hold too
much. An image that needs more than the budget waits for all of it and is decoded alone: the memory of a rank decides
how long curation takes, never which images it keeps. Each thread holds at most one reservation of each budget, and
FILE_MEMORY is always reserved first, so that threads can't wait for each other in a circle.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

IMAGE_MEMORY_FRACTION = 0.5
"""Fraction of a rank's memory that may be taken by images, encoded and decoded."""
ENCODED_FRACTION = 0.25
"""Fraction of the memory for images that may be taken by encoded ones."""
DEFAULT_BYTES = 4 << 30
"""Memory for images if the memory of the rank is unknown."""


class MemoryBudget:
    """A number of bytes that threads reserve parts of; waiting threads are served in the order of their calls."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._reserved_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def reserved_bytes(self) -> int:
        """Number of bytes that are reserved now."""
        return self._reserved_bytes

    def resize(self, total_bytes: int) -> None:
        """Change the size of the budget; reservations stay."""
        with self._changed:
            self.total_bytes = total_bytes
            self._changed.notify_all()

    @contextmanager
    def reserve(self, number: int) -> Iterator[None]:
        """Reserve a number of bytes for the block, at most the whole budget, and wait until they are free."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._may_reserve(ticket, number))
                reserved_bytes = min(number, self.total_bytes)
                self._reserved_bytes += reserved_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._reserved_bytes -= reserved_bytes
                self._changed.notify_all()

    def _may_reserve(self, ticket: object, number: int) -> bool:
        """Return whether it is the turn of this reservation, and it fits."""
        return self._waiting[0] is ticket and self._reserved_bytes + min(number, self.total_bytes) <= self.total_bytes


FILE_MEMORY = MemoryBudget(int(DEFAULT_BYTES * ENCODED_FRACTION))
"""Budget of this process for encoded images that are being verified."""
IMAGE_MEMORY = MemoryBudget(DEFAULT_BYTES - FILE_MEMORY.total_bytes)
"""Budget of this process for images that are being decoded, and for their pixels."""


def limit_image_memory(rank_bytes: int | None) -> None:
    """Size both budgets by the memory of this rank; None: it is unknown."""
    total_bytes = DEFAULT_BYTES if rank_bytes is None else int(rank_bytes * IMAGE_MEMORY_FRACTION)
    FILE_MEMORY.resize(int(total_bytes * ENCODED_FRACTION))
    IMAGE_MEMORY.resize(total_bytes - FILE_MEMORY.total_bytes)
