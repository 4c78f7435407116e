"""The run after all its stages were advanced: `RunTransition`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from sailvl_operator.api.status import Reason
from sailvl_operator.core.gates import GateResult
from sailvl_operator.core.stage_view import StageTransition


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTransition:
    """The transitions of all stages, and what they mean for the run."""

    stages: tuple[StageTransition, ...]
    """One transition for each stage in the order of the spec."""
    gate_results: tuple[GateResult, ...] = ()
    """Results of the gates of all stages that have succeeded."""
    active_seconds_left: float = inf
    """Seconds for which the run may still be active."""

    @property
    def failure(self) -> tuple[Reason, str] | None:
        """Reason and message of the run's failure; None if it doesn't fail."""
        if stage_failure := next((stage.failure for stage in self.stages if stage.failure), ""):
            return Reason.STAGE_FAILED, stage_failure
        if self.active_seconds_left <= 0:
            return Reason.DEADLINE_EXCEEDED, "the run was active for activeDeadlineSeconds; raise it to resume the run"
        failed = (r for r in self.gate_results if not r.is_passed and r.on_fail == "Stop")
        return next(((Reason.GATE_FAILED, f"stage {r.stage}: {r.message}") for r in failed), None)
