"""Stop on request: the worker's entry leaves a file when SIGTERM arrives; the ranks agree on the step to stop at."""

from __future__ import annotations

from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.rank.scratch import Scratch


class Preemption:
    def __init__(self, scratch: Scratch) -> None:
        self._file = scratch.stop_file

    @property
    def is_requested_locally(self) -> bool:
        """Whether this rank's own worker was asked to stop."""
        return self._file.exists()

    def should_stop(self) -> bool:
        """Whether any worker was asked to stop. COLLECTIVE: every rank calls it at the same step."""
        return sum_over_ranks(float(self.is_requested_locally))[0] > 0
