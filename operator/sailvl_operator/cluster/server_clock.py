"""The time, as far as the API server's clock contradicts our own; asked by whatever compares times with each other.

Status and objects carry times of the API server and of every replica that ever led. A replica whose clock is off would
end attempts too soon, let runs expire and spoil the ledger, so the Date of the server's answers sets bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime


class ServerClock:
    """Our own clock, kept between what the server's answers allow for."""

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self.monotonic = monotonic
        self._earliest = float("-inf")  # the server's time at our monotonic zero lies between these
        self._latest = float("inf")
        self._text, self._date = "", 0.0

    def now(self) -> float:
        """Unix seconds."""
        elapsed = self.monotonic()
        return min(max(self._wall(), elapsed + self._earliest), elapsed + self._latest)

    def observe_date(self, date: str | None, *, sent: float, received: float) -> None:
        """The Date header of an answer, with our monotonic times around it. One that can't be read says nothing."""
        if not date or not self._read(date):
            return
        earliest, latest = self._date - received, self._date + 1.0 - sent  # it counts whole seconds
        self._earliest, self._latest = max(self._earliest, earliest), min(self._latest, latest)
        if self._earliest > self._latest:  # one of the clocks was set, drifted, or is another server's
            self._earliest, self._latest = earliest, latest

    def _read(self, date: str) -> bool:
        if date != self._text:
            try:
                self._date = parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
            except ValueError:
                return False
            self._text = date
        return True
