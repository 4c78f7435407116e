"""Controller: takes keys from the work queue, observes, lets `reconcile` decide, applies the decision, writes the
status.

Built by `app.py`; it runs in the leading replica only. A key says which run to reconcile, not what has happened to it:
the state is always read from the stores.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists
from sailvl_operator.api.status import Reason, decode_status, encode_status
from sailvl_operator.api.types import Defaults, Run
from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.apply import Applier, RefusalLog, Refusals
from sailvl_operator.cluster.background import keep_running
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.merge_patch import build_merge_patch, drop_nulls
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunEntry, RunKey, RunStore
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.core.decision import Decision
from sailvl_operator.core.finished import reconcile_unreadable
from sailvl_operator.core.observe import Observed, observe
from sailvl_operator.core.ownership import find_policy_state, is_own_job, is_own_service, select_pods
from sailvl_operator.core.reconcile import reconcile
from sailvl_operator.core.stage_view import ACTIVE
from sailvl_operator.errors import (
    REFUSALS,
    ApiError,
    Conflict,
    Forbidden,
    NameConflict,
    NotFound,
    OperatorError,
)
from sailvl_operator.metrics import Metrics

log = logging.getLogger(__name__)

Action = Callable[[Run, Decision], Awaitable[Refusals]]


class Controller:
    """Reconciles runs with several concurrent workers. `clock`: Unix seconds."""

    def __init__(
        self,
        *,
        client: Client,
        runs: RunStore,
        owned_objects: OwnedObjects,
        progress: ProgressReader,
        diagnostics: StartDiagnostics,
        recorder: Recorder,
        queue: WorkQueue[RunKey],
        metrics: Metrics,
        defaults: Defaults,
        allowed: AllowLists = ALLOW_ALL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._runs = runs
        self._owned_objects = owned_objects
        self._progress = progress
        self._diagnostics = diagnostics
        self._refusals = RefusalLog()
        self._recorder = recorder
        self._queue = queue
        self._metrics = metrics
        self._defaults = defaults
        self._allowed = allowed
        self._clock = clock
        self._applier = Applier(client, owned_objects, metrics_peers=defaults.metrics_peers)

    async def run(self, workers: int) -> None:
        """Reconcile keys with `workers` workers until cancelled. Waits for the informers first, since a Job that is
        missing from the stores is taken for deleted."""
        await self._owned_objects.wait_synced()
        self._owned_objects.retain_deleted()
        self._queue.start(workers)
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                worker = keep_running("controller", self._run_worker, self._metrics.count_loop_error)
                group.create_task(worker, name=f"worker-{number}")

    async def _run_worker(self) -> None:
        while True:
            key, waited, is_due = await self._queue.get()
            self._metrics.queue_seconds.observe(waited)
            try:
                with self._metrics.reconcile_seconds.time():
                    outcome = await self._reconcile_or_retry(key, may_defer=not is_due)
            finally:
                self._queue.done(key)
            self._metrics.reconciles.labels(outcome).inc()

    async def _reconcile_or_retry(self, key: RunKey, *, may_defer: bool) -> str:
        """Reconcile a key and return the outcome for the metric: `deferred` if its namespace has edited too many specs.
        An error of any kind is logged and retried."""
        logger = logging.LoggerAdapter(log, {"namespace": key[0], "run": key[1]})
        if wait_seconds := self._runs.get_wait_seconds(key):
            self._queue.add_after(key, wait_seconds)
            return "deferred"
        try:
            outcome = await self.reconcile_key(key, may_defer=may_defer)
        except Conflict as error:
            logger.info("conflict: stale resourceVersion, retrying: %s", error)
            await self._refresh(key)
            self._queue.retry(key)
            return "conflict"
        except (ApiError, NameConflict) as error:
            logger.warning("reconcile failed, retrying in %.1f s: %s", self._queue.retry(key), error)
            return "error"
        except DocumentError as error:
            logger.warning("reconcile failed, retrying in %.1f s: %s", self._queue.retry(key), error)
            self._report_unreadable(key, error)
            return "error"
        except Exception:
            logger.exception("internal error, retrying in %.1f s", self._queue.retry(key))
            return "error"
        self._queue.reset_backoff(key)
        return outcome

    def _report_unreadable(self, key: RunKey, error: DocumentError) -> None:
        """Report with an Event that the status of a run was changed to something that can't be read."""
        entry = self._runs.get(key)
        if entry is not None:
            message = f"{error}; remove the field with kubectl edit --subresource=status, or delete the run"
            self._recorder.record(entry.run, type_="Warning", reason=Reason.INVALID_STATUS, message=message)

    async def reconcile_key(self, key: RunKey, *, may_defer: bool = False) -> str:
        """Reconcile one run: decide, apply, write the status, record events.

        Return `written`, `unchanged`, or `deferred` if the writes can wait and other keys can't. Raises ApiError or
        NameConflict; the reconcile can be repeated.
        """
        entry = self._runs.get(key)
        if entry is None:
            self._forget_run(key)
            return "unchanged"
        self._check_permissions(entry.run)
        decision = self._decide(entry, key)
        refusal = await self._apply(entry.run, decision, self._applier.apply)
        if refusal is None and may_defer and decision.may_be_deferred and self._queue.has_backlog(key):
            return self._defer_writes(key, decision)
        if refusal is None and decision.ensure_service:
            refusal = await self._apply(entry.run, decision, self._applier.ensure_service)
        if refusal is None:
            self._refusals.clear(key)
        else:
            decision = self._decide(entry, key)  # decide again, so that the status shows the refusal
        is_written = await self._write_status(entry.run, decision)
        if is_written:
            self._record(entry.run, decision)
        if refusal is not None:
            self._schedule(key, decision)  # other stages may have deadlines of their own
            raise refusal
        if is_written:
            self._queue.add(key)  # the new status may allow more: an attempt's number is written before its Job exists
            return "written"
        self._schedule(key, decision)
        self._forget_closed(entry.run, key)
        return "unchanged"

    def _check_permissions(self, run: Run) -> None:
        """Report with an Event that Jobs or pods of a run's namespace can't be watched, and raise Forbidden: without
        them, a missing Job would be taken for deleted."""
        for missing in self._owned_objects.find_missing_permissions(run.namespace):
            message = f"the operator is {missing}"
            self._recorder.record(run, type_="Warning", reason=Reason.FORBIDDEN, message=message)
            raise Forbidden(message, status=403, reason="Forbidden")

    def _defer_writes(self, key: RunKey, decision: Decision) -> str:
        """Defer the status and the Service of a run. Its own deadlines stay scheduled."""
        self._queue.defer(key)
        self._schedule(key, decision)
        return "deferred"

    async def _apply(self, run: Run, decision: Decision, action: Action) -> OperatorError | None:
        """Apply a part of a decision. Return, and log, the first refusal that the user has to resolve; raise other
        errors, which are transient."""
        key = run.namespace, run.name
        try:
            refused = await action(run, decision)
        except REFUSALS as error:
            stages = (decision.status or decode_status(run.status)).stages
            self._refusals.replace(key, {(s.name, s.attempt): error for s in stages if s.state in ACTIVE})
            return error
        if not refused:
            return None
        self._refusals.replace(key, refused)
        return next(iter(refused.values()))

    def _decide(self, entry: RunEntry, key: RunKey) -> Decision:
        now = self._clock()
        observed = self._observe(entry.run, key)
        if entry.problem:
            return reconcile_unreadable(entry.run, entry.problem, observed, now=now)
        return reconcile(
            entry.run,
            observed,
            now=now,
            defaults=self._throttled_defaults(key[0]),
            allowed=self._allowed,
            planned=entry.planned,
        )

    def _throttled_defaults(self, namespace: str) -> Defaults:
        """Return the defaults with a progress interval that keeps the runs of a namespace to its share of writes."""
        seconds = max(self._defaults.progress_seconds, self._progress.write_interval_seconds(namespace))
        return replace(self._defaults, progress_seconds=seconds)

    def _observe(self, run: Run, key: RunKey) -> Observed:
        """Observe the objects that this run owns. A deleted run of the same name may have left others, and other
        clients may have created some with the run's labels."""
        jobs = self._owned_objects.jobs.get(key)
        has_service = any(is_own_service(run, service) for service in self._owned_objects.services.get(key))
        return observe(
            (job for job in jobs if is_own_job(run, job)),
            select_pods(run, jobs, self._owned_objects.pods.get(key)),
            progress=self._progress.get(key, run.uid),
            progress_errors=self._progress.get_errors(key, run.uid),
            obstacles=self._diagnostics.get(key),
            refusals=self._refusals.get(key),
            has_service=has_service,
            network_policy=find_policy_state(run, self._owned_objects.network_policies.get(key)),
        )

    async def _write_status(self, run: Run, decision: Decision) -> bool:
        """Patch the changed fields of the status, on condition that the run is still the version that was observed.
        Return whether anything was written."""
        if decision.status is None:
            return False
        changes = build_merge_patch(run.status, drop_nulls(encode_status(decision.status)))
        if not changes:
            return False
        precondition = {"uid": run.uid, "resourceVersion": run.resource_version}
        try:
            written = await self._client.patch(
                resources.RUNS,
                run.namespace,
                run.name,
                {"metadata": precondition, "status": changes},
                subresource="status",
                decode_as=resources.SailVLRun,
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
        """Read a run after a conflict, instead of waiting for its watch event."""
        try:
            self._runs.put_patched(await self._client.get(resources.RUNS, *key, decode_as=resources.SailVLRun))
        except ApiError as error:
            log.info("%s/%s not refreshed: %s", *key, error)

    def _forget_run(self, key: RunKey) -> None:
        """Drop everything that is stored of a deleted run. The garbage collector deletes its objects."""
        self._queue.cancel_timer(key)
        self._owned_objects.jobs.forget(key, lambda _: True)
        self._owned_objects.pods.forget(key, lambda _: True)
        self._progress.forget(key, lambda *_: True)
        self._diagnostics.forget(key)
        self._refusals.clear(key)

    def _forget_closed(self, run: Run, key: RunKey) -> None:
        """Drop the evidence of closed attempts: those with a newer attempt, and those of finished stages."""
        current = {s.name: s for s in decode_status(run.status).stages}

        def is_closed(stage: str, attempt: int) -> bool:
            status = current.get(stage)
            return status is None or attempt < status.attempt or status.state in ("Succeeded", "Failed")

        self._owned_objects.jobs.forget(key, lambda job: is_closed(job.stage, job.attempt))
        self._owned_objects.pods.forget(key, lambda pod: is_closed(pod.stage, pod.attempt))
        self._progress.forget(key, is_closed)
