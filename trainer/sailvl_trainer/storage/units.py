"""Bytes as people read them, for messages."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show_bytes(number: int) -> str:
    """1536 as 1.5 KiB."""
    size, unit = float(number), 0
    while size >= 1024 and unit + 1 < len(UNITS):
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{number} B"
