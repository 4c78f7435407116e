"""An event loop in which time passes only when nothing is left to do, and then at once; for walks through hours.

Everything that happens in it follows from what was asked of it and from the seed of `random`: a walk can be repeated.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Waits for no file: the time asked for has passed when it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for another, and no timer is set: nothing will ever happen")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """No sockets, no threads, no signals: only tasks and timers."""

    def __init__(self) -> None:
        self._time = _NoWaiting()
        super().__init__(self._time)

    def time(self) -> float:
        return self._time.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
