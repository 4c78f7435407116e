"""Counts and decimals of the spec as numbers, and numbers as the decimal strings of the status."""

from __future__ import annotations

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """A large count: "4096", "32K", "1.5M", "131B"."""
    factor = _SUFFIXES.get(text[-1:], 1)
    return round(float(text.rstrip("KMBT")) * factor)


def format_decimal(value: float) -> str:
    """At most six significant digits: the API conventions allow no floats."""
    return f"{value:.6g}"


def format_duration(seconds: float) -> str:
    """Two units at most, as kubectl prints ages: 45s, 3m20s, 5h, 2d4h."""
    whole = max(0, round(seconds))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, whole = divmod(whole, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return "".join(parts[:2]) or "0s"
