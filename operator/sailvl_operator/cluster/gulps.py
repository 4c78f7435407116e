"""Watches are read in gulps: changes come in groups, and waking up for each costs more than what it tells."""

from __future__ import annotations

import asyncio

SECONDS = 0.1
"""Between two reads. Meanwhile what comes is kept where it is received."""
_LARGE = 65536
"""Bytes of a read after which the next follows at once: nobody is to fall behind."""


async def pause(read: int, *, is_whole: bool) -> None:
    """After so many bytes were read, which end with a whole line or in the middle of one."""
    if is_whole and read < _LARGE:
        await asyncio.sleep(SECONDS)
