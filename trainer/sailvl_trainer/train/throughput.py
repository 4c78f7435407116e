"""Step timing: how a step's wall-clock time divides into phases, and the rates that follow. Called by the trainer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SMOOTHING = 0.1
"""EMA weight of the newest step time; the mean is used for the ETA."""


@dataclass(kw_only=True, slots=True)
class StepTimer:
    """Measures the steps of one rank."""

    world_size: int
    pack_tokens: int
    """Capacity of one pack, in tokens."""
    peak_flops: float = 0.0
    """Peak FLOP/s of one rank's device; 0 if unknown, and no MFU is reported then."""
    mean_step_seconds: float = 0.0
    """Exponential moving average of the wall-clock time per step, including data waits and checkpoints."""
    _phase_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _previous_end: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add a block's duration to a phase of the current step: data, forward, backward, step or checkpoint."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phase_seconds[name] += time.monotonic() - start

    def end_step(self, *, tokens: int, microbatches: int, flops: float, now: float) -> dict[str, float]:
        """Return the metrics of the step that has just ended; `tokens` and `flops` count all ranks.

        A checkpoint is saved after its step has ended, so its time counts towards the next step.
        """
        seconds, self._previous_end = max(1e-9, now - self._previous_end), now
        weight = SMOOTHING if self.mean_step_seconds else 1.0
        self.mean_step_seconds += weight * (seconds - self.mean_step_seconds)
        phases = {f"{name}_seconds": spent for name, spent in self._phase_seconds.items()}
        self._phase_seconds.clear()
        capacity = self.pack_tokens * self.world_size * max(1, microbatches)
        mfu = {"mfu": flops / seconds / (self.peak_flops * self.world_size)} if self.peak_flops else {}
        return phases | mfu | {"tokens_per_second": tokens / seconds, "pack_fill": tokens / capacity}
