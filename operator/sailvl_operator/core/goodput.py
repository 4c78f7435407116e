"""Where a run's time went: a ledger in the status, settled whenever the status is written for another reason.

Between two writes a stage's state doesn't change, so the whole seconds since the last settlement belong to the state as
it was last written; while workers run, what they say of themselves divides them. Every second is entered once: the
buckets add up to the wall clock. Called by `reconcile`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from sailvl_operator.api.status import ConditionType, Goodput, StageProgress, StageStatus, Status
from sailvl_operator.core.activities import MAIN, Buckets, count_seconds
from sailvl_operator.core.desired.workload import count_gpus
from sailvl_operator.core.failure import was_saved
from sailvl_operator.core.stage_view import ACTIVE, View
from sailvl_operator.core.units import apportion, format_time, parse_time
from sailvl_trainer.contract import ExitCode

PRODUCTIVE = ("training", "curating", "evaluating")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What the time since the last settlement was for one stage."""

    seconds: Buckets
    gpu_seconds: Buckets
    lost: int
    """Seconds of training, these or earlier ones, whose steps are done again."""
    lost_gpu: int
    status: StageStatus


def settle(
    old: Status, views: Sequence[View], statuses: Sequence[StageStatus], *, now: float
) -> tuple[Goodput, list[StageStatus]]:
    """The ledger at `now` (Unix seconds), and the stages with what they need of it next time."""
    since = _last_settlement(old, now)
    elapsed = max(0, int(now - since))
    entries = [_enter(view, status, since, elapsed) for view, status in zip(views, statuses, strict=True)]
    active = [entry for entry in entries if entry.seconds]
    spent = _add(*(entry.seconds for entry in active)) or _idle(old, elapsed)
    seconds = _add(old.goodput.seconds, apportion(elapsed, spent))
    gpu_seconds = _add(old.goodput.gpu_seconds, *(entry.gpu_seconds for entry in active))
    for entry in active:
        _move(seconds, entry.lost)
        _move(gpu_seconds, entry.lost_gpu)
    ledger = Goodput(
        settled_at=format_time(since + elapsed),
        seconds={name: value for name, value in seconds.items() if value},
        gpu_seconds={name: value for name, value in gpu_seconds.items() if value},
        lost_steps=max(old.goodput.lost_steps, sum(_count_lost_steps(entry.status) for entry in entries)),
    )
    return ledger, [entry.status for entry in entries]


def share(ledger: Goodput) -> str:
    """The part of the time, but that of suspension, in which something was done that lasts: a percentage."""
    whole = sum(ledger.seconds.values()) - ledger.seconds.get("suspended", 0)
    useful = sum(ledger.seconds.get(name, 0) for name in PRODUCTIVE)
    return f"{100 * useful // whole}%" if whole > 0 else ""


def price(ledger: Goodput, per_gpu_hour: str | UnsetType) -> Goodput:
    """The same with the cost of its GPU seconds, and of those in which nothing was done that lasts."""
    if per_gpu_hour is UNSET:
        return ledger
    useful = sum(ledger.gpu_seconds.get(name, 0) for name in PRODUCTIVE)
    whole = sum(ledger.gpu_seconds.values())
    return msgspec.structs.replace(
        ledger, cost=_cost(whole, per_gpu_hour), lost_cost=_cost(whole - useful, per_gpu_hour)
    )


def _cost(gpu_seconds: int, per_gpu_hour: str) -> str:
    return f"{gpu_seconds * float(per_gpu_hour) / 3600:.2f}"


def _last_settlement(old: Status, now: float) -> float:
    """A run that begins, or goes on after it had ended, owes nothing for before, but for the part of a second that was
    too little for the books at its end."""
    settled = parse_time(old.goodput.settled_at)
    if not old.start_time:
        return max(now, settled)
    if old.completion_time:
        rest = parse_time(old.completion_time) - settled
        return max(now - rest if 0 < rest < 1 else now, settled)
    return settled or parse_time(old.start_time)


def _enter(view: View, new: StageStatus, since: float, elapsed: int) -> _Entry:
    if view.status.state not in ACTIVE:
        return _Entry(seconds={}, gpu_seconds={}, lost=0, lost_gpu=0, status=new)
    seconds = _attribute(view, since, elapsed)
    unsaved = _count_unsaved(view) + seconds.get("training", 0)
    is_lost, is_saved = _is_lost(view, new), _is_saved(view, new)
    progress = new.progress
    if progress is not None:
        left = 0 if is_lost or is_saved else unsaved
        progress = msgspec.structs.replace(progress, unsaved_seconds=left)
    status = msgspec.structs.replace(new, progress=progress)
    lost, gpus = unsaved if is_lost else 0, _count_gpus(view)
    held = {name: value * gpus for name, value in seconds.items() if name != "queued" or _when_placed(view) is None}
    return _Entry(
        seconds=seconds,
        gpu_seconds=held,
        lost=lost,
        lost_gpu=lost * gpus,
        status=status,
    )


def _attribute(view: View, since: float, elapsed: int) -> Buckets:
    match view.status.state:
        case "Running":
            return _divide(view, elapsed)
        case "Starting":
            placed = _when_placed(view)
            queued = elapsed if placed is None else min(elapsed, max(0, round(placed - since)))
            return {"queued": queued, "starting": elapsed - queued}
        case "Restarting" if view.job is not None and view.job.is_suspended:
            return {"queued": elapsed}
        case state:
            return {state.lower(): elapsed}


def _when_placed(view: View) -> float | None:
    """When the last of its workers was given to a node (Unix seconds); None while one waits for that."""
    is_whole = len({pod.index for pod in view.pods if pod.placed}) == view.nodes
    return max(pod.placed for pod in view.pods) if is_whole else None


def _divide(view: View, elapsed: int) -> Buckets:
    """By what the workers did since they were last read; what they don't name is their stage's work, as is all of those
    that nobody can ask."""
    seen = view.observed.get(*view.key).progress
    kind = view.planned.stage.kind
    if seen is None or seen.phase == "starting":
        is_known = view.status.progress is not None and view.status.progress.seconds
        is_at_work = seen is None and (is_known or bool(view.observed.get(*view.key).progress_error))
        return {MAIN[kind] if is_at_work else "starting": elapsed}
    before = view.status.progress.seconds if view.status.progress is not None else {}
    spent = {name: max(0, value - before.get(name, 0)) for name, value in count_seconds(seen, kind).items()}
    unnamed = max(0, elapsed - sum(spent.values()))
    spent[MAIN[kind]] = spent.get(MAIN[kind], 0) + unnamed
    return apportion(elapsed, spent)


def _is_lost(view: View, new: StageStatus) -> bool:
    """Whether steps since the checkpoint are done again: after a failure, or when ranks started again in place."""
    if new.last_failure is not None and new.last_failure != view.status.last_failure:
        return new.last_failure.exit_code != ExitCode.PREEMPTED
    if view.status.state == "Running" and new.attempt != view.status.attempt:
        return not was_saved(view.pods)  # a person started it again
    if new.state == "Suspended":
        return view.status.state != "Suspended" and not was_saved(view.pods)
    before, after = view.status.progress, new.progress
    is_same = new.attempt == view.status.attempt
    return is_same and before is not None and after is not None and after.step < before.step


def _count_lost_steps(status: StageStatus) -> int:
    return 0 if status.progress is None else status.progress.lost_steps


def _is_saved(view: View, new: StageStatus) -> bool:
    """Whether nothing is unsaved now: a new checkpoint, an attempt that ended with one, or the stage's end."""
    return new.state == "Succeeded" or new.checkpoint != view.status.checkpoint or new.attempt != view.status.attempt


def _count_unsaved(view: View) -> int:
    progress: StageProgress | None = view.status.progress
    return 0 if progress is None else progress.unsaved_seconds


def _count_gpus(view: View) -> int:
    """Those that its workers hold."""
    placed = {pod.index for pod in view.pods if pod.placed and not pod.is_gone}
    nodes = view.nodes if view.status.state == "Running" else len(placed)
    known = None if view.job is None else view.job.gpus  # today's spec may ask for others
    return nodes * (count_gpus(view.planned.workers) if known is None else known)


def _idle(old: Status, elapsed: int) -> Buckets:
    """No stage was active."""
    return {"suspended" if old.is_true(ConditionType.SUSPENDED) else "queued": elapsed}


def _move(seconds: Buckets, lost: int) -> None:
    """From training to lost."""
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
