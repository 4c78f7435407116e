"""How an attempt that failed is followed by another, or ends the run: budgets, backoff, nodes to avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from sailvl_operator.api.status import Cause, LastFailure, Reason, StageStatus
from sailvl_operator.core import restart
from sailvl_operator.core.decision import Event
from sailvl_operator.core.failure import Evidence, find_silent, is_node_suspect, was_saved
from sailvl_operator.core.stage_view import Step, View, next_attempt, read_progress
from sailvl_operator.core.units import format_time
from sailvl_trainer.contract import ExitCode

_REMEMBERED_NODES = 32


def fail_infra(view: View, message: str) -> Step:
    """An end that no pod can tell of itself."""
    last = LastFailure(cause=Cause.INFRA, attempt=view.status.attempt, message=message, time=format_time(view.now))
    return _fail(view, Cause.INFRA, last)


def fail_by(view: View, evidence: Evidence, others: Sequence[Evidence]) -> Step:
    """An end that a pod tells of; `others`: what all pods tell, that one among them."""
    if evidence.is_peer_lost:
        return _fail_by_silence(view, evidence, others)
    last = LastFailure(
        cause=evidence.cause,
        attempt=view.status.attempt,
        rank=evidence.rank,
        node=evidence.pod.node,
        exit_code=evidence.exit_code,
        message=evidence.message,
        traceback=evidence.traceback,
        time=format_time(evidence.at or view.now),
    )
    suspect = evidence.pod.node if is_node_suspect(evidence, others) else ""
    newest = max(other.superseded_by for other in others)
    return _fail(view, evidence.cause, last, suspect=suspect, newest=newest)


def _fail_by_silence(view: View, evidence: Evidence, others: Sequence[Evidence]) -> Step:
    """All that told have lost another worker. A dead machine says nothing; the API server learns of it much later."""
    silent = find_silent(others, view.pods)
    words = f"worker {evidence.pod.index} on node {evidence.pod.node} lost another: {evidence.message}"
    if silent is not None:
        words = f"worker {silent.index} on node {silent.node} fell silent; {words}"
    last = LastFailure(
        cause=evidence.cause,
        attempt=view.status.attempt,
        node="" if silent is None else silent.node,
        exit_code=evidence.exit_code if silent is None else None,
        message=words[:1000],
        traceback=evidence.traceback,
        time=format_time(evidence.at or view.now),
    )
    return _fail(view, evidence.cause, last, suspect=last.node)


def fail_start(view: View, message: str) -> Step:
    """The workers never ran together: the machines that were left alone may be the only ones, so all count again."""
    step = fail_infra(view, message)
    return replace(step, status=msgspec.structs.replace(step.status, node_failures={}))


def requeue(view: View) -> Step:
    """A queue took the workers' place: the next attempt queues again, and no budget is charged."""
    last = LastFailure(
        cause=Cause.PREEMPTED,
        attempt=view.status.attempt,
        exit_code=ExitCode.PREEMPTED if was_saved(view.pods) else ExitCode.TERMINATED,
        message="the queue gave the place of the workers to others",
        time=format_time(view.now),
    )
    return _fail(view, Cause.PREEMPTED, last)


def lose_result(view: View) -> Step:
    """It succeeded, and its words are gone: the next attempt finds the result."""
    return fail_infra(view, "the result's message was lost; the stage finds its result on the storage")


def restart_by_hand(view: View) -> Step:
    """A person asked for it: the next attempt at once, with fresh budgets and no machine left alone."""
    status = msgspec.structs.replace(
        next_attempt(read_progress(view)),
        state="Restarting",
        counted_restarts={},
        node_failures={},
        next_attempt_time="",
        completion_time="",
    )
    words = f"Stage {status.name} starts again with attempt {status.attempt}, as asked for"
    return Step(status=status, events=(Event(reason=Reason.RESTART_REQUESTED, message=words),))


def _fail(view: View, cause: Cause, last: LastFailure, *, suspect: str = "", newest: int = 0) -> Step:
    """The next attempt, or the end of the run. `suspect`: the node that may be at fault; `newest`: the attempt that has
    cut this one off."""
    failed = _blame_node(msgspec.structs.replace(read_progress(view), last_failure=last), suspect)
    if restart.may_restart(cause, _counted_restarts(view, failed), view.run.spec.restart_policy):
        return _again(view, cause, last.message, failed, newest)
    status = msgspec.structs.replace(failed, state="Failed", completion_time=format_time(view.now))
    message = describe_failure(status)
    event = Event(reason=Reason.STAGE_FAILED, message=message, type="Warning")
    return Step(status=status, events=(event,), failure=message)


def describe_failure(status: StageStatus) -> str:
    """Why a failed stage failed, and what a person can do."""
    last = status.last_failure
    assert last is not None, "a stage fails with its last failure noted"
    hint = restart.advice(Cause(last.cause))
    words = f"Stage {status.name}, attempt {status.attempt}: {last.cause}: {last.message}"
    return words[: 1000 - len(hint)] + (f"; {hint}" if hint else "")


def _again(view: View, cause: Cause, message: str, status: StageStatus, newest: int) -> Step:
    counted_restarts = _counted_restarts(view, status)
    wait = restart.backoff_seconds(
        cause, counted_restarts, f"{view.run.uid}/{status.name}/{status.attempt}", view.defaults
    )
    new = msgspec.structs.replace(
        next_attempt(status, after=newest),
        state="Restarting",
        restarts=_one_more(status.restarts, cause),
        counted_restarts=_one_more(counted_restarts, cause),
        progress_at_last_failure=max(status.progress_at_last_failure, _saved_step(view, status)),
        next_attempt_time=format_time(view.now + wait) if wait else "",
    )
    words = f"Stage {status.name}, attempt {status.attempt}: {cause}: {message}; attempt {new.attempt} follows"
    event = Event(reason=Reason.RESTARTING, message=words[:1000], type="Warning")
    return Step(status=new, events=(event, *_tell_avoided(view, new)))


def _counted_restarts(view: View, status: StageStatus) -> Mapping[str, int]:
    """Restarts that count: none when more is saved than at the failure before."""
    return {} if _saved_step(view, status) > status.progress_at_last_failure else status.counted_restarts


def _saved_step(view: View, status: StageStatus) -> int:
    """What a new attempt doesn't do again: steps up to the checkpoint; curation and evaluation keep what they did."""
    if view.planned.stage.kind in ("curate", "evaluate"):
        return 0 if status.progress is None else status.progress.step
    return 0 if status.checkpoint is None else status.checkpoint.step


def _blame_node(status: StageStatus, node: str) -> StageStatus:
    if not node:
        return status
    failures = _one_more(status.node_failures, node)
    worst = sorted(failures, key=lambda name: (-failures[name], name))[:_REMEMBERED_NODES]
    return msgspec.structs.replace(status, node_failures={name: failures[name] for name in sorted(worst)})


def _tell_avoided(view: View, new: StageStatus) -> tuple[Event, ...]:
    policy = view.run.spec.restart_policy
    before = set(restart.avoided_nodes(view.status, policy))
    return tuple(
        Event(
            reason=Reason.NODE_EXCLUDED,
            type="Warning",
            message=f"Node {node} took {new.node_failures[node]} attempts of stage {new.name} down and gets no more of "
            "its workers; look at the machine, then annotate the run to start the stage again",
        )
        for node in restart.avoided_nodes(new, policy)
        if node not in before
    )


def _one_more(counts: Mapping[str, int], name: str) -> dict[str, int]:
    return dict(counts) | {name: counts.get(name, 0) + 1}
