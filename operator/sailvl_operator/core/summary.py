"""Build `status.summary`, the columns of `kubectl get`."""

from __future__ import annotations

from collections.abc import Sequence

from sailvl_operator.api.status import StageStatus, Summary
from sailvl_operator.core.stage_view import ACTIVE, StageTransition
from sailvl_operator.core.units import format_duration


def build_summary(transitions: Sequence[StageTransition], *, reason: str, goodput: str) -> Summary:
    """Summarise the stage that currently matters most and the workers of all active stages."""
    stages = [transition.status for transition in transitions]
    position, current = _find_current_stage(stages)
    progress = current.progress
    is_active = current.state not in ("Succeeded", "Failed")
    percent = 0 if progress is None or not progress.steps else 100 * progress.step // progress.steps
    eta = progress.eta_seconds if progress is not None and is_active else None
    return Summary(
        stage=f"{current.name} ({position}/{len(stages)})",
        progress=f"{100 if current.state == 'Succeeded' else percent}%",
        ready=_format_ready_workers(transitions),
        restarts=sum(sum(stage.restarts.values()) for stage in stages),
        goodput=goodput,
        eta="" if eta is None else format_duration(eta),
        reason=reason,
    )


def _find_current_stage(stages: Sequence[StageStatus]) -> tuple[int, StageStatus]:
    """Return the first failed stage, else the first active one, else the last that succeeded, else the first.

    The first item is the stage's position, from 1.
    """
    by_urgency = [
        [(i, s) for i, s in enumerate(stages, 1) if s.state == "Failed"],
        [(i, s) for i, s in enumerate(stages, 1) if s.state not in ("Failed", "Pending", "Succeeded")],
        [(i, s) for i, s in reversed(list(enumerate(stages, 1))) if s.state == "Succeeded"],
        [(1, stages[0])],
    ]
    return next(group[0] for group in by_urgency if group)


def _format_ready_workers(transitions: Sequence[StageTransition]) -> str:
    """Format ready and wanted workers of the active stages, as in "3/4"; empty if no stage is active."""
    views = [transition.view for transition in transitions if transition.status.state in ACTIVE]
    ready = sum(pod.is_ready and not pod.is_gone for view in views for pod in view.attempt.pods)
    return f"{ready}/{sum(view.nodes for view in views)}" if views else ""
