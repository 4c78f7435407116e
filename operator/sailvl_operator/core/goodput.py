"""Account for the run's time in a goodput ledger: whole seconds by bucket that add up to the wall-clock time.

A stage's state doesn't change between two writes of the status. The seconds since the last write therefore belong to
the state as it was last written; while workers run, their activity counters divide them. The ledger is brought up to
date whenever the status is written for another reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from sailvl_operator.api.status import ConditionType, Goodput, StageStatus, Status
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import MAX_COUNT
from sailvl_operator.core.evidence import was_checkpoint_saved
from sailvl_operator.core.progress import MAIN_BUCKETS, Buckets, count_seconds
from sailvl_operator.core.stage_view import ACTIVE, StageTransition, StageView
from sailvl_operator.core.units import format_time, parse_time
from sailvl_trainer.contract import ExitCode

PRODUCTIVE_BUCKETS = ("training", "curating", "evaluating")
"""Buckets of the time whose results last."""

_MAX_COST = 1e18
"""Largest cost that is shown; a price may be any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageAccount:
    """The interval since the last accounting, as one stage spent it."""

    status: StageStatus
    """Next status of the stage, with the unsaved seconds that the next accounting needs."""
    seconds: Buckets
    gpu_seconds: Buckets
    lost_seconds: int = 0
    """Seconds of training, of this or an earlier interval, whose steps have to be repeated."""
    lost_gpu_seconds: int = 0


def update_goodput(run: Run, old: Status, new: Status, stages: Sequence[StageTransition], *, now: float) -> Status:
    """Return the new status with goodput at `now`; goodput alone is never a reason to write a status."""
    if new == old or (old.completion_time and new.completion_time):
        return new
    ledger, statuses = account(old, stages, now=now)
    ledger = _add_cost(ledger, run.spec.price_per_gpu_hour)
    summary = msgspec.structs.replace(new.summary, goodput=_format_goodput(ledger))
    return msgspec.structs.replace(new, goodput=ledger, stages=statuses, summary=summary)


def account(old: Status, stages: Sequence[StageTransition], *, now: float) -> tuple[Goodput, list[StageStatus]]:
    """Return the ledger at `now` (Unix seconds) and the statuses of the stages with their unsaved seconds."""
    since = _find_last_accounting(old, now)
    elapsed = max(0, int(now - since))
    accounts = [_account_stage(stage, since, elapsed) for stage in stages]
    active = [entry for entry in accounts if entry.seconds]
    spent = _add(*(entry.seconds for entry in active)) or _classify_idle_time(old, elapsed)
    seconds = _add(old.goodput.seconds, apportion(elapsed, spent))
    gpu_seconds = _add(old.goodput.gpu_seconds, *(entry.gpu_seconds for entry in active))
    for entry in active:
        _move_to_lost(seconds, entry.lost_seconds)
        _move_to_lost(gpu_seconds, entry.lost_gpu_seconds)
    lost_steps = sum(0 if entry.status.progress is None else entry.status.progress.lost_steps for entry in accounts)
    ledger = Goodput(
        settled_at=format_time(since + elapsed),
        seconds={name: min(value, MAX_COUNT) for name, value in seconds.items() if value},
        gpu_seconds={name: min(value, MAX_COUNT) for name, value in gpu_seconds.items() if value},
        lost_steps=max(old.goodput.lost_steps, lost_steps),
    )
    return ledger, [entry.status for entry in accounts]


def apportion(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Split `total` into whole shares in proportion to the weights, by the largest-remainder method.

    The shares add up to `total`. Weights that are all zero count as equal.
    """
    known = weights if sum(weights.values()) > 0 else dict.fromkeys(weights, 1)
    whole = sum(known.values())
    shares = {name: total * weight // whole for name, weight in known.items()}
    by_remainder = sorted(known, key=lambda name: (-(total * known[name] % whole), name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _format_goodput(ledger: Goodput) -> str:
    """Format the productive share of the time in which the run wasn't suspended, as a percentage."""
    whole = sum(ledger.seconds.values()) - ledger.seconds.get("suspended", 0)
    productive = sum(ledger.seconds.get(name, 0) for name in PRODUCTIVE_BUCKETS)
    return f"{100 * productive // whole}%" if whole > 0 else ""


def _add_cost(ledger: Goodput, price_per_gpu_hour: str | UnsetType) -> Goodput:
    """Return the ledger with the cost of all its GPU seconds and of those that weren't productive."""
    if price_per_gpu_hour is UNSET:
        return ledger
    whole = sum(ledger.gpu_seconds.values())
    lost = whole - sum(ledger.gpu_seconds.get(name, 0) for name in PRODUCTIVE_BUCKETS)
    costs = (min(seconds * float(price_per_gpu_hour) / 3600, _MAX_COST) for seconds in (whole, lost))
    cost, lost_cost = (f"{value:.2f}" for value in costs)
    return msgspec.structs.replace(ledger, cost=cost, lost_cost=lost_cost)


def _find_last_accounting(old: Status, now: float) -> float:
    """Return the Unix seconds from which time has to be accounted.

    Accounting starts at `now` for a new or resumed run. The fraction of a second dropped when the run last finished is
    carried over.
    """
    settled = parse_time(old.goodput.settled_at)
    if not old.start_time:
        return max(now, settled)
    if old.completion_time:
        rest = parse_time(old.completion_time) - settled
        return max(now - rest if 0 < rest < 1 else now, settled)
    return settled or parse_time(old.start_time)


def _account_stage(transition: StageTransition, since: float, elapsed: int) -> _StageAccount:
    view, status = transition.view, transition.status
    if view.status.state not in ACTIVE:
        return _StageAccount(status=status, seconds={}, gpu_seconds={})
    seconds = _divide_interval(view, since, elapsed)
    unsaved = seconds.get("training", 0)
    if view.status.progress is not None:
        unsaved += view.status.progress.unsaved_seconds
    is_lost = _is_work_lost(view, status)
    if status.progress is not None:
        left = 0 if is_lost or _is_work_saved(view, status) else unsaved
        status = msgspec.structs.replace(
            status, progress=msgspec.structs.replace(status.progress, unsaved_seconds=left)
        )
    lost, gpus = unsaved if is_lost else 0, _count_gpus(view)
    is_queued = _find_scheduling_time(view) is None
    return _StageAccount(
        status=status,
        seconds=seconds,
        gpu_seconds={name: value * gpus for name, value in seconds.items() if name != "queued" or is_queued},
        lost_seconds=lost,
        lost_gpu_seconds=lost * gpus,
    )


def _divide_interval(view: StageView, since: float, elapsed: int) -> Buckets:
    """Return the buckets of an active stage's interval."""
    match view.status.state:
        case "Running":
            return _divide_by_activity(view, elapsed)
        case "Starting":
            scheduled = _find_scheduling_time(view)
            queued = elapsed if scheduled is None else min(elapsed, max(0, round(scheduled - since)))
            return {"queued": queued, "starting": elapsed - queued}
        case "Restarting" if view.attempt.job is not None and view.attempt.job.is_suspended:
            return {"queued": elapsed}
        case state:
            return {state.lower(): elapsed}


def _find_scheduling_time(view: StageView) -> float | None:
    """Return the Unix seconds at which the last worker was scheduled to a node; None while one waits for that."""
    pods = view.attempt.pods
    is_complete = len({pod.index for pod in pods if pod.placed}) == view.nodes
    return max(pod.placed for pod in pods) if is_complete else None


def _divide_by_activity(view: StageView, elapsed: int) -> Buckets:
    """Split the interval by the activity counters that workers reported since the last accounting.

    Time they don't report counts as the stage's main activity; so does everything if the workers can't be reached.
    """
    report, kind = view.attempt.progress, view.planned.kind
    known = {} if view.status.progress is None else view.status.progress.seconds
    if report is None or report.phase == "starting":
        is_working = report is None and (known or view.attempt.progress_error)
        return {MAIN_BUCKETS[kind] if is_working else "starting": elapsed}
    spent = {name: max(0, value - known.get(name, 0)) for name, value in count_seconds(report, kind).items()}
    unreported = max(0, elapsed - sum(spent.values()))
    spent[MAIN_BUCKETS[kind]] = spent.get(MAIN_BUCKETS[kind], 0) + unreported
    return apportion(elapsed, spent)


def _is_work_lost(view: StageView, new: StageStatus) -> bool:
    """Return whether steps since the checkpoint are repeated: after a failure, or after ranks restarted in place."""
    old = view.status
    if new.last_failure is not None and new.last_failure != old.last_failure:
        return new.last_failure.exit_code != ExitCode.PREEMPTED
    if old.state == "Running" and new.attempt != old.attempt:  # restarted on request
        return not was_checkpoint_saved(view.attempt.pods)
    if new.state == "Suspended":
        return old.state != "Suspended" and not was_checkpoint_saved(view.attempt.pods)
    is_same_attempt = new.attempt == old.attempt
    return (
        is_same_attempt
        and old.progress is not None
        and new.progress is not None
        and new.progress.step < old.progress.step
    )


def _is_work_saved(view: StageView, new: StageStatus) -> bool:
    """Return whether nothing is unsaved now: a new checkpoint, the end of the attempt with one, or of the stage."""
    return new.state == "Succeeded" or new.checkpoint != view.status.checkpoint or new.attempt != view.status.attempt


def _count_gpus(view: StageView) -> int:
    """Return the GPUs that the stage's workers hold; those of a Job count, since an edited spec may ask for others."""
    job, pods = view.attempt.job, view.attempt.pods
    scheduled = {pod.index for pod in pods if pod.placed and not pod.is_gone}
    nodes = view.nodes if view.status.state == "Running" else len(scheduled)
    return nodes * (view.planned.gpus_per_node if job is None or job.gpus is None else job.gpus)


def _classify_idle_time(old: Status, elapsed: int) -> Buckets:
    """Return the bucket of an interval in which no stage was active."""
    return {"suspended" if old.is_true(ConditionType.SUSPENDED) else "queued": elapsed}


def _move_to_lost(seconds: Buckets, lost: int) -> None:
    """Move seconds from training to lost."""
    moved = min(lost, seconds.get("training", 0))
    if moved:
        seconds["training"] -= moved
        seconds["lost"] = seconds.get("lost", 0) + moved


def _add(*parts: Mapping[str, int]) -> Buckets:
    total: Buckets = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total
