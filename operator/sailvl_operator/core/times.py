"""Unix seconds as the status writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache


@lru_cache(maxsize=64)  # one look at a run writes the same moment many times
def format_time(seconds: float) -> str:
    """RFC 3339 in UTC, to the millisecond: backoffs are shorter than a second's rounding would allow."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
