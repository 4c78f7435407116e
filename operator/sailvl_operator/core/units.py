"""Counts and decimals of the spec as numbers, and numbers as the decimal strings of the status."""

from __future__ import annotations

from collections.abc import Mapping

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


def apportion(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Whole shares in proportion to the weights that add up to `total`: the largest remainders get what is left.

    Weights that are all zero count as equal.
    """
    known = weights if sum(weights.values()) > 0 else dict.fromkeys(weights, 1)
    whole = sum(known.values())
    shares = {name: total * weight // whole for name, weight in known.items()}
    by_remainder = sorted(known, key=lambda name: (-(total * known[name] % whole), name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
