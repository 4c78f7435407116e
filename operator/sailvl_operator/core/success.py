"""Complete a stage whose workers have all exited with code 0."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sailvl_operator.api.status import Reason, StageProgress
from sailvl_operator.core.decision import Event
from sailvl_operator.core.observe import PodRecord, decode_termination
from sailvl_operator.core.progress import MAX_METRICS
from sailvl_operator.core.restart_policy import restart_after_infra_failure
from sailvl_operator.core.stage_view import StageTransition, StageView
from sailvl_operator.core.units import format_decimal, format_duration, format_time
from sailvl_trainer.contract import Result


def complete_stage(view: StageView) -> StageTransition | None:
    """Return the transition to Succeeded if every worker succeeded, and None otherwise.

    If the termination message with the result is missing, start another attempt: it finds the result on the storage.
    """
    if not has_succeeded(view.attempt.pods, view.nodes):
        return None
    result = find_result(view.attempt.pods)
    if result is None:
        message = "the termination message is missing; a new attempt will read the result from the storage"
        return restart_after_infra_failure(view, message)
    known_lost_steps = 0 if view.status.progress is None else view.status.progress.lost_steps
    status = msgspec.structs.replace(
        view.status,
        state="Succeeded",
        completion_time=format_time(view.now),
        output=result.output,
        reused=result.reused,
        metrics={name: format_decimal(value) for name, value in sorted(result.metrics.items())[:MAX_METRICS]},
        progress=StageProgress(
            step=result.steps,
            steps=result.steps,
            tokens=result.tokens,
            eta_seconds=0,
            lost_steps=known_lost_steps if result.reused else max(known_lost_steps, result.lost_steps),
        ),
        next_attempt_time="",
    )
    duration = format_duration(result.seconds)
    outcome = "reused the result of an earlier run" if result.reused else f"succeeded in {duration}"
    event = Event(reason=Reason.STAGE_SUCCEEDED, message=f"Stage {status.name} {outcome}")
    return StageTransition(view=view, status=status, events=(event,))


def has_succeeded(pods: Sequence[PodRecord], nodes: int) -> bool:
    """Return whether each of the `nodes` indexes has a pod that exited with code 0."""
    done = {pod.index for pod in pods if pod.terminated is not None and pod.terminated.exit_code == 0}
    return len(done) == nodes


def find_result(pods: Sequence[PodRecord]) -> Result | None:
    """Return the stage's result from the termination message of any worker that has it."""
    terminations = (decode_termination(pod) for pod in pods)
    return next((t.result for t in terminations if t is not None and t.result is not None), None)
