"""Apply `spec.restartPolicy`: restart a failed attempt, or fail the stage once the budget of the cause is used up.

A restart counts against its budget only as long as the stage has saved no progress since the last failure. The backoff
also grows with each attempt in a row that ended soon after its start, whatever its workers report: a worker can claim
any cause and any progress. Nodes that fail too often are excluded from further attempts of the stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from sailvl_operator.api.status import Cause, Reason, StageStatus
from sailvl_operator.api.types import Defaults, RestartPolicy
from sailvl_operator.core.decision import Event
from sailvl_operator.core.failure import Diagnosis, Undecided, diagnose_attempt, diagnose_infra_failure
from sailvl_operator.core.stage_view import StageTransition, StageView
from sailvl_operator.core.units import format_time

_ADVICE: dict[str, str] = {
    Cause.CONFIG: "change the settings named above",
    Cause.DATA: "fix or remove the record named above",
    Cause.NON_FINITE: "lower learningRate, or check the data of the last step",
    Cause.OUT_OF_MEMORY: "raise the memory limit, or lower packTokens or packTiles",
}
"""Advice to the user by cause; other causes have no general remedy."""
SHORT_ATTEMPT_SECONDS = 30.0
"""An attempt that ended earlier after its start is a short one."""
_UNDELAYED_RESTARTS = 3
"""Restarts in a row that follow at once after Preempted and Infra."""
_MAX_TRACKED_NODES = 32
"""Nodes whose failures the status counts, those with the most failures first."""
_MAX_INHERITED_ATTEMPTS = 10_000
"""Largest gap in attempt numbers that an earlier run of the same name may leave; a larger number is ignored."""


def restart_failed(view: StageView) -> StageTransition | None:
    """Restart or fail a stage whose attempt failed; None if no pod has evidence of a failure."""
    diagnosis = diagnose_attempt(view)
    if isinstance(diagnosis, Undecided):
        return StageTransition(view=view, status=view.latest, requeue_at=diagnosis.until)
    return None if diagnosis is None else restart_or_fail(view, diagnosis)


def restart_after_infra_failure(view: StageView, message: str) -> StageTransition:
    """Restart or fail a stage whose attempt failed without evidence of any pod."""
    return restart_or_fail(view, diagnose_infra_failure(view, message))


def restart_or_fail(view: StageView, diagnosis: Diagnosis) -> StageTransition:
    """Return the transition to the next attempt if the budget of the cause allows one, else to Failed."""
    status = msgspec.structs.replace(view.latest, last_failure=diagnosis.failure)
    status = _count_node_failure(status, diagnosis.suspect_node)
    status = msgspec.structs.replace(status, short_attempts=_count_short_attempts(view))
    counted = _find_counted_restarts(view, status)
    if may_restart(Cause(diagnosis.failure.cause), counted, view.run.spec.restart_policy):
        return _restart(view, status, counted, diagnosis)
    status = msgspec.structs.replace(status, state="Failed", completion_time=format_time(view.now))
    message = describe_failure(status)
    event = Event(reason=Reason.STAGE_FAILED, message=message, type="Warning")
    return StageTransition(view=view, status=status, events=(event,), failure=message)


def bump_attempt(status: StageStatus, *, after: int = 0) -> StageStatus:
    """Return the status with the next attempt number and with the counters of the attempt's workers at zero.

    `after` is an attempt number that the storage knows from an earlier run of the same name; the next number is
    larger than it.
    """
    progress = status.progress and msgspec.structs.replace(status.progress, seconds={}, in_place_restarts=0)
    is_inherited = status.attempt < after <= status.attempt + _MAX_INHERITED_ATTEMPTS
    number = (after if is_inherited else status.attempt) + 1
    return msgspec.structs.replace(status, attempt=number, progress=progress)


def describe_failure(status: StageStatus) -> str:
    """Describe why a failed stage failed and what the user can do about it."""
    last = status.last_failure
    if last is None:  # a client removed it
        return f"Stage {status.name} attempt {status.attempt} failed"
    advice = _ADVICE.get(last.cause, "")
    message = f"Stage {status.name} attempt {status.attempt} failed ({last.cause}): {last.message}"
    return message[: 1000 - len(advice)] + (f"; {advice}" if advice else "")


def find_budget(cause: Cause, policy: RestartPolicy) -> int | None:
    """Return how many restarts a cause allows; None means any number."""
    budgets: dict[Cause, int | None] = {
        Cause.CONFIG: 0,
        Cause.DATA: 0,
        Cause.NON_FINITE: 3,
        Cause.OUT_OF_MEMORY: 1,
        Cause.PREEMPTED: None,
        Cause.INFRA: policy.max_infra_restarts,
        Cause.STALLED: policy.max_restarts,
        Cause.CRASH: policy.max_restarts,
    }
    return budgets[cause]


def may_restart(cause: Cause, counted_restarts: Mapping[str, int], policy: RestartPolicy) -> bool:
    """Return whether the budget of a cause allows one more restart. Crashes and stalls share a budget."""
    budget = find_budget(cause, policy)
    if budget is None:
        return True
    causes = (Cause.STALLED, Cause.CRASH) if cause in (Cause.STALLED, Cause.CRASH) else (cause,)
    return sum(counted_restarts.get(c, 0) for c in causes) < budget


def find_excluded_nodes(status: StageStatus, policy: RestartPolicy) -> tuple[str, ...]:
    """Return the nodes, by name, that have caused `maxFailuresPerNode` failures of a stage."""
    if not policy.max_failures_per_node:
        return ()
    return tuple(sorted(node for node, n in status.node_failures.items() if n >= policy.max_failures_per_node))


def _restart(view: StageView, failed: StageStatus, counted: Mapping[str, int], diagnosis: Diagnosis) -> StageTransition:
    cause, message = Cause(diagnosis.failure.cause), diagnosis.failure.message
    seed = f"{view.run.uid}/{failed.name}/{failed.attempt}"
    restarts = max(counted.get(cause, 0), failed.short_attempts - 1)
    wait = _choose_backoff_seconds(cause, restarts, seed, view.defaults)
    status = msgspec.structs.replace(
        bump_attempt(failed, after=diagnosis.superseded_by),
        state="Restarting",
        restarts=_increment(failed.restarts, cause),
        counted_restarts=_increment(counted, cause),
        progress_at_last_failure=max(failed.progress_at_last_failure, _find_saved_step(view, failed)),
        next_attempt_time=format_time(view.now + wait) if wait else "",
    )
    text = (
        f"Stage {failed.name} attempt {failed.attempt} failed ({cause}): {message}; "
        f"restarting as attempt {status.attempt}"
    )
    event = Event(reason=Reason.RESTARTING, message=text[:1000], type="Warning")
    return StageTransition(view=view, status=status, events=(event, *_report_excluded_nodes(view, status)))


def _choose_backoff_seconds(cause: Cause, restarts: int, seed: str, defaults: Defaults) -> float:
    """Return the seconds before the next attempt: none for the first infrastructure failures, else doubling.

    `restarts` is the number of restarts in a row before this one. The jitter of up to a quarter is derived from `seed`,
    so that a restarted operator waits equally long.
    """
    if cause in (Cause.PREEMPTED, Cause.INFRA) and restarts < _UNDELAYED_RESTARTS:
        return 0.0
    doubled = defaults.backoff_seconds * 2.0 ** min(restarts, 10)
    jitter = hashlib.sha256(seed.encode()).digest()[0] / 255 / 4
    return float(min(doubled, defaults.backoff_limit_seconds) * (1 + jitter))


def _count_short_attempts(view: StageView) -> int:
    """Return how many attempts in a row were short, the failed one included; 0 if that one wasn't.

    Only times that the API server sets are read, because workers can report any time.
    """
    jobs = (view.attempt.job, view.attempt.gone_job, view.attempt.altered_job)
    starts = [job.started or job.created for job in jobs if job is not None]
    starts += [pod.created for pod in view.attempt.pods]
    is_short = view.now - min(starts, default=view.now) < SHORT_ATTEMPT_SECONDS
    return view.status.short_attempts + 1 if is_short else 0


def _find_counted_restarts(view: StageView, status: StageStatus) -> Mapping[str, int]:
    """Return the restarts that count against the budgets: none if the stage saved progress since the last failure."""
    return {} if _find_saved_step(view, status) > status.progress_at_last_failure else status.counted_restarts


def _find_saved_step(view: StageView, status: StageStatus) -> int:
    """Return the step from which a new attempt continues.

    Training continues from its checkpoint; curation and evaluation keep everything that they have done. A step beyond
    the stage's last one is no progress.
    """
    steps = 0 if status.progress is None else status.progress.steps
    if view.planned.kind in ("curate", "evaluate"):
        saved = 0 if status.progress is None else status.progress.step
    else:
        saved = 0 if status.checkpoint is None else status.checkpoint.step
    return min(saved, steps) if steps else saved


def _count_node_failure(status: StageStatus, node: str) -> StageStatus:
    if not node:
        return status
    failures = _increment(status.node_failures, node)
    worst = sorted(failures, key=lambda name: (-failures[name], name))[:_MAX_TRACKED_NODES]
    return msgspec.structs.replace(status, node_failures={name: failures[name] for name in sorted(worst)})


def _report_excluded_nodes(view: StageView, status: StageStatus) -> tuple[Event, ...]:
    """Return an event for each node that the next attempt excludes and the last one didn't."""
    policy = view.run.spec.restart_policy
    known = set(find_excluded_nodes(view.status, policy))
    return tuple(
        Event(
            reason=Reason.NODE_EXCLUDED,
            type="Warning",
            message=f"Node {node} caused {status.node_failures[node]} failures of stage {status.name} and is excluded; "
            "check the node, then restart the stage to use it again",
        )
        for node in find_excluded_nodes(status, policy)
        if node not in known
    )


def _increment(counts: Mapping[str, int], name: str) -> dict[str, int]:
    return dict(counts) | {name: counts.get(name, 0) + 1}
