"""Limits how often edited specs are parsed and reconciled, for each namespace on its own.

A user can edit the largest spec in a tight loop, and the reconciles of a new one take the event loop tens of
milliseconds.
Within the limit an edit is reconciled at once. Beyond it, edits wait, and all edits of a run that come meanwhile are
reconciled together. New runs don't count, so a restart or a thousand runs created together are not slowed down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

BYTES_PER_SECOND = 1 << 20
"""Edited specs of one namespace that are parsed in a second, as bytes of JSON; four of the largest, or 100 typical
ones."""
_BURST_SECONDS = 8.0
"""Seconds of that rate which are available at once."""
_BYTES_PER_EDIT = 5 << 10
"""Bytes that each edit counts in addition to its size, for the reconcile."""
_MAX_NAMESPACES = 1024
"""Namespaces with recent edits that are remembered before those without debt are dropped."""


class EditLimit:
    """Rate limit by namespace, in bytes of edited specs.

    `monotonic`: seconds of a clock that never goes back.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._paid_at: dict[str, float] = {}  # when the edits so far would be done at the limited rate, by namespace

    def count_edit(self, namespace: str, size_bytes: int) -> None:
        """Count an edited spec that is being parsed."""
        now = self._monotonic()
        if len(self._paid_at) >= _MAX_NAMESPACES:
            self._paid_at = {name: at for name, at in self._paid_at.items() if at > now}
        start = max(now, self._paid_at.get(namespace, now))
        self._paid_at[namespace] = start + (size_bytes + _BYTES_PER_EDIT) / BYTES_PER_SECOND

    def get_wait_seconds(self, namespace: str) -> float:
        """Return for how long the next edit has to wait; 0 if it may be parsed now."""
        return max(0.0, self._paid_at.get(namespace, 0.0) - self._monotonic() - _BURST_SECONDS)
