"""Stop on request: the worker's entry leaves a file when SIGTERM arrives; the ranks agree on the step to stop at."""

from __future__ import annotations

from pathlib import Path

from sailvl_trainer.runtime.distributed import sum_over_ranks

STOP_FILE = "stop"


class Preemption:
    def __init__(self, scratch: Path) -> None:
        self._file = scratch / STOP_FILE

    def requested(self) -> bool:
        """Whether any worker was asked to stop. COLLECTIVE: every rank calls it at the same step."""
        return sum_over_ranks(float(self._file.exists()))[0] > 0
