"""Clock that is bounded by the API server's, for all comparisons with times in statuses and objects.

Those times were written by the API server and by every replica that ever led. A replica with a wrong clock would end
attempts too early, expire runs and corrupt the goodput ledger. The Date header of each response bounds the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime


class ServerClock:
    """Our wall clock, clamped to the range that the responses of the API server allow."""

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self.monotonic = monotonic
        self._earliest = float("-inf")  # bounds of the server's time when our monotonic clock was 0
        self._latest = float("inf")
        self._header, self._header_time = "", 0.0

    def now(self) -> float:
        """Return the time in Unix seconds."""
        elapsed = self.monotonic()
        return min(max(self._wall(), elapsed + self._earliest), elapsed + self._latest)

    def observe_date(self, header: str | None, *, sent: float, received: float) -> None:
        """Narrow the bounds by the Date header of a response. `sent`, `received`: monotonic times of the request and
        of the response. An invalid header is ignored."""
        if not header or not self._parse(header):
            return
        earliest, latest = self._header_time - received, self._header_time + 1.0 - sent  # the header drops fractions
        self._earliest, self._latest = max(self._earliest, earliest), min(self._latest, latest)
        if self._earliest > self._latest:  # a clock was set or drifted, or another API server responded
            self._earliest, self._latest = earliest, latest

    def _parse(self, header: str) -> bool:
        if header != self._header:
            try:
                self._header_time = parsedate_to_datetime(header).replace(tzinfo=UTC).timestamp()
            except ValueError:
                return False
            self._header = header
        return True
