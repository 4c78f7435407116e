"""The shell around the pure core: takes keys from the work queue, observes, lets `reconcile` decide, carries it out.

Started by `cli/operator.py` once this process leads. Keys come from the runs' watch (`handlers.py`), the informers, the
progress reader and timers; what a key is about is always found by looking at the stores.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import decode_status, encode_status
from sailvl_operator.api.types import Run
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.apply import Actions, Refused
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.merge_patch import build_merge_patch, drop_nulls
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunEntry, RunKey, RunStore
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.core.decision import Decision
from sailvl_operator.core.observe import Observed, PodRecord, observe
from sailvl_operator.core.reconcile import reconcile, refuse_unreadable
from sailvl_operator.core.stage_view import ACTIVE
from sailvl_operator.errors import (
    REFUSALS,
    ApiError,
    Conflict,
    NameConflict,
    NotFound,
    OperatorError,
)
from sailvl_operator.metrics import Metrics
from sailvl_operator.settings import PROGRESS_WRITES

log = logging.getLogger(__name__)

Act = Callable[[Run, Decision], Awaitable[Refused]]


class Controller:
    """One per process. Everything it needs is handed in."""

    def __init__(
        self,
        *,
        client: Client,
        runs: RunStore,
        children: Children,
        progress: ProgressReader,
        complaints: StartDiagnostics,
        recorder: Recorder,
        queue: WorkQueue[RunKey],
        metrics: Metrics,
        defaults: Defaults,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._runs = runs
        self._children = children
        self._progress = progress
        self._complaints = complaints
        self._recorder = recorder
        self._queue = queue
        self._metrics = metrics
        self._defaults = defaults
        self._clock = clock
        self._actions = Actions(client, children)

    async def run(self, workers: int) -> None:
        """Serve keys until cancelled; waits for the informers first, since a missing Job means something."""
        await self._children.wait_synced()
        self._children.retain_deleted()
        self._queue.start()
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._work(), name=f"worker-{number}")

    async def _work(self) -> None:
        while True:
            key, waited, is_due = await self._queue.get()
            self._metrics.queue_seconds.observe(waited)
            try:
                with self._metrics.reconcile_seconds.time():
                    outcome = await self._process(key, may_wait=not is_due)
            finally:
                self._queue.done(key)
            self._metrics.reconciles.labels(outcome).inc()

    async def _process(self, key: RunKey, *, may_wait: bool) -> str:
        """Look at one run. Whatever goes wrong is tried again later, and never ends the worker."""
        log_of_run = logging.LoggerAdapter(log, {"namespace": key[0], "run": key[1]})
        try:
            outcome = await self.reconcile_key(key, may_wait=may_wait)
        except Conflict as error:
            log_of_run.info("looked at an old state, looking again: %s", error)
            await self._refresh(key)
            self._queue.retry(key)
            return "conflict"
        except (ApiError, NameConflict) as error:
            log_of_run.warning("tried again in %.1f s: %s", self._queue.retry(key), error)
            return "error"
        except Exception:
            log_of_run.exception("an error of the operator itself; tried again in %.1f s", self._queue.retry(key))
            return "error"
        self._queue.reset_backoff(key)
        return outcome

    async def reconcile_key(self, key: RunKey, *, may_wait: bool = False) -> str:
        """One reconcile: decide, act, write the status. Says whether the status was written, is unchanged, or has to
        wait because other runs wait to be started."""
        entry = self._runs.get(key)
        if entry is None:
            self._forget_run(key)
            return "unchanged"
        decision = self._decide(entry, key)
        refusal = await self._act(entry.run, decision, self._actions.carry_out)
        if refusal is None and may_wait and decision.can_wait and self._queue.has_backlog():
            return self._defer_writes(key, decision)
        if refusal is None and decision.serve:
            refusal = await self._act(entry.run, decision, self._actions.serve)
        if refusal is None:
            self._complaints.accept(key)
        else:
            decision = self._decide(entry, key)  # the status says who refuses
        is_written = await self._write_status(entry.run, decision)
        if is_written:
            self._record(entry.run, decision)
        if refusal is not None:
            self._schedule(key, decision)  # other stages may wait for something
            raise refusal
        if is_written:
            self._queue.add(key)  # the written status may ask for more: an attempt's number comes before its Job
            return "written"
        self._schedule(key, decision)
        self._forget_closed(entry.run, key)
        return "unchanged"

    def _defer_writes(self, key: RunKey, decision: Decision) -> str:
        """The writes wait; what the run itself waits for doesn't."""
        self._queue.defer(key)
        self._schedule(key, decision)
        return "deferred"

    async def _act(self, run: Run, decision: Decision, action: Act) -> OperatorError | None:
        """What a person must mend comes back, and is noted; what passes by itself is raised."""
        key = run.namespace, run.name
        try:
            refused = await action(run, decision)
        except REFUSALS as error:
            stages = (decision.status or decode_status(run.status)).stages
            self._complaints.refuse(key, {(s.name, s.attempt): str(error) for s in stages if s.state in ACTIVE})
            return error
        if not refused:
            return None
        self._complaints.refuse(key, {attempt: str(error) for attempt, error in refused.items()})
        return next(iter(refused.values()))

    def _decide(self, entry: RunEntry, key: RunKey) -> Decision:
        now = self._clock()
        if entry.problem:
            return refuse_unreadable(entry.run, entry.problem, self._observe(entry.run, key), now=now)
        observed = self._observe(entry.run, key)
        return reconcile(entry.run, observed, now=now, defaults=self._pace(), planned=entry.planned)

    def _pace(self) -> Defaults:
        """Many runs at once write their progress less often each: together they stay below a rate."""
        seconds = max(self._defaults.progress_seconds, len(self._progress) / PROGRESS_WRITES)
        return replace(self._defaults, progress_seconds=seconds)

    def _observe(self, run: Run, key: RunKey) -> Observed:
        """Observe the objects that this run owns; a deleted run of the same name may have left others."""
        jobs = (job for job in self._children.jobs.get(key) if job.owner_uid == run.uid)
        has_service = any(service.owner_uid == run.uid for service in self._children.services.get(key))
        pods = (pod for pod in self._children.pods.get(key) if _is_pod_of(run, pod))
        return observe(
            jobs,
            pods,
            progress=self._progress.get(key, run.uid),
            progress_errors=self._progress.get_errors(key, run.uid),
            wait_reasons=self._complaints.get(key),
            refusals=self._complaints.get_refusals(key),
            has_service=has_service,
        )

    async def _write_status(self, run: Run, decision: Decision) -> bool:
        """Patch what changed, against the very version that was looked at; tells whether anything had."""
        if decision.status is None:
            return False
        changes = build_merge_patch(run.status, drop_nulls(encode_status(decision.status)))
        if not changes:
            return False
        guard = {"uid": run.uid, "resourceVersion": run.resource_version}
        try:
            written = await self._client.patch(
                resources.RUNS,
                run.namespace,
                run.name,
                {"metadata": guard, "status": changes},
                subresource="status",
            )
        except NotFound:
            self._runs.delete((run.namespace, run.name), run.uid)
            return False
        self._runs.put_patched(written)
        return True

    def _record(self, run: Run, decision: Decision) -> None:
        for event in decision.events:
            self._recorder.record(run, type_=event.type, reason=event.reason, message=event.message)

    def _schedule(self, key: RunKey, decision: Decision) -> None:
        if decision.requeue_at is None:
            self._queue.cancel_timer(key)
        else:
            self._queue.add_after(key, decision.requeue_at - self._clock())

    async def _refresh(self, key: RunKey) -> None:
        """After a conflict: read the run instead of waiting for its event."""
        try:
            self._runs.put_patched(await self._client.get(resources.RUNS, *key))
        except ApiError as error:
            log.info("%s/%s could not be read: %s", *key, error)

    def _forget_run(self, key: RunKey) -> None:
        """The run is gone; the garbage collector takes its children."""
        self._queue.cancel_timer(key)
        self._children.jobs.forget(key, lambda _: True)
        self._children.pods.forget(key, lambda _: True)
        self._progress.forget(key, lambda *_: True)
        self._complaints.forget(key)

    def _forget_closed(self, run: Run, key: RunKey) -> None:
        """Let the evidence of closed attempts go: a newer one has begun, or the stage is over."""
        current = {s.name: s for s in decode_status(run.status).stages}

        def is_closed(stage: str, attempt: int) -> bool:
            status = current.get(stage)
            return status is None or attempt < status.attempt or status.state in ("Succeeded", "Failed")

        self._children.jobs.forget(key, lambda job: is_closed(job.stage, job.attempt))
        self._children.pods.forget(key, lambda pod: is_closed(pod.stage, pod.attempt))
        self._progress.forget(key, is_closed)


def _is_pod_of(run: Run, pod: PodRecord) -> bool:
    """Earlier versions gave their pods no run's uid: those that are older than the run are not its own."""
    return pod.run_uid == run.uid if pod.run_uid else pod.created >= run.created


def handle_run_event(type_: str | None, raw: dict[str, object], runs: RunStore, queue: WorkQueue[RunKey]) -> None:
    """A watch event of a run: keep the newest state and look at its key."""
    metadata = raw["metadata"]
    assert isinstance(metadata, dict)
    key = metadata["namespace"], metadata["name"]
    if type_ == "DELETED":
        runs.delete(key, metadata["uid"])
        queue.add(key)
    elif runs.put(raw):
        queue.add(key)
