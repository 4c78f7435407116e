"""Watches are read in gulps: changes come in groups, and waking up for each costs more than what it tells."""

from __future__ import annotations

import asyncio

import aiohttp

SECONDS = 0.1
"""Between two reads; less than changes are gathered for before anybody looks at them."""


async def pause(response: aiohttp.ClientResponse) -> None:
    """After a read: leave what comes next to the kernel for a moment."""
    transport = response.connection and response.connection.transport
    if transport is None or transport.is_closing():
        return
    transport.pause_reading()
    try:
        await asyncio.sleep(SECONDS)
    finally:
        if not transport.is_closing():
            transport.resume_reading()
