"""Parse and format times, counts, decimals and durations.

The spec and the status carry strings, because the Kubernetes API conventions forbid floats; the core computes with
numbers and Unix seconds.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from sailvl_operator.api.untrusted import DocumentError, clean_line

_LAST_SECOND = 253402300799.0
"""Unix seconds of the last second of the year 9999."""
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@lru_cache(maxsize=4096)  # each reconcile parses every time of the run's status again
def parse_time(text: str | None) -> float:
    """Return an RFC 3339 time as Unix seconds, and 0 for None or an empty string.

    Raises DocumentError for any other text, and for years that `datetime` can't represent.
    """
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except (ValueError, OverflowError) as error:
        raise DocumentError(f"{clean_line(str(text), 40)!r} is not a time") from error


@lru_cache(maxsize=64)  # one reconcile formats the same moment many times
def format_time(seconds: float) -> str:
    """Format Unix seconds as RFC 3339 in UTC with milliseconds, because a backoff may be shorter than a second.

    Seconds outside of the years 1970 to 9999 are limited to these.
    """
    return (
        datetime.fromtimestamp(min(max(seconds, 0.0), _LAST_SECOND), UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def parse_count(text: str) -> int:
    """Parse a count with an optional suffix: "4096", "32K", "1.5M", "131B"."""
    factor = _SUFFIXES.get(text[-1:], 1)
    return round(float(text.rstrip("KMBT")) * factor)


def parse_decimal(text: str) -> float:
    """Return the number that a decimal string of a status holds. Raises DocumentError for any other text."""
    try:
        return float(text)
    except ValueError as error:
        raise DocumentError(f"{clean_line(text, 40)!r} is not a number") from error


def format_decimal(value: float) -> str:
    """Format a number with at most six significant digits."""
    return f"{value:.6g}"


def format_duration(seconds: float) -> str:
    """Format a duration with at most two units, as kubectl prints ages: 45s, 3m20s, 5h, 2d4h."""
    whole = max(0, round(seconds))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, whole = divmod(whole, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return "".join(parts[:2]) or "0s"
