"""Where a step's seconds go, and how fast and how full it was; called by the loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SMOOTHING = 0.1
"""Weight of the latest step in the mean that the end is foretold by."""


@dataclass(kw_only=True, slots=True)
class Meter:
    world_size: int
    pack_tokens: int
    peak: float = 0.0
    """Operations a second that a rank's device can do; 0: not known."""
    seconds_a_step: float = 0.0
    """Wall clock, smoothed, with waiting and saving."""
    _parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _before: float = field(default_factory=time.monotonic)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count a block's seconds to a part of the step: data, forward, backward, step, checkpoint."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._parts[name] += time.monotonic() - start

    def end_step(self, *, tokens: int, microsteps: int, operations: float, now: float) -> dict[str, float]:
        """Metrics of the step that ended; `tokens`, `operations`: over all ranks.

        A checkpoint counts to the step after it.
        """
        seconds, self._before = max(1e-9, now - self._before), now
        weight = SMOOTHING if self.seconds_a_step else 1.0
        self.seconds_a_step += weight * (seconds - self.seconds_a_step)
        parts = {f"{name}_seconds": spent for name, spent in self._parts.items()}
        self._parts.clear()
        capacity = self.pack_tokens * self.world_size * max(1, microsteps)
        used = {"mfu": operations / seconds / (self.peak * self.world_size)} if self.peak else {}
        return parts | used | {"tokens_per_second": tokens / seconds, "pack_fill": tokens / capacity}
