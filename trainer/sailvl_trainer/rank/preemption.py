"""Stop requests: the worker creates a stop file when SIGTERM arrives, and the ranks agree on the step to stop at."""

from __future__ import annotations

from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.rank.scratch import Scratch


class Preemption:
    """Shows a stage whether its attempt was asked to stop."""

    def __init__(self, scratch: Scratch) -> None:
        self._stop_file = scratch.stop_file

    @property
    def is_requested_locally(self) -> bool:
        """Whether this rank's own worker was asked to stop."""
        return self._stop_file.exists()

    def should_stop(self) -> bool:
        """Return whether any worker was asked to stop. A collective: every rank has to call it at the same step."""
        return sum_over_ranks(float(self.is_requested_locally))[0] > 0
