"""The operator process: builds all parts, runs them in one event loop, and ends when one of them fails.

`build_controller` is the composition root, used by the process and by the tests that run a controller without kopf.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import kopf
from prometheus_client import CollectorRegistry

from sailvl_operator import handlers, health
from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import keep_running
from sailvl_operator.cluster.backpressure import StartupBacklog
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.edit_limit import EditLimit
from sailvl_operator.cluster.lease import Leadership
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.readable_pods import find_readable
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.cluster.server_clock import ServerClock
from sailvl_operator.cluster.start_diagnostics import DELAY_SECONDS, StartDiagnostics, find_waiting
from sailvl_operator.cluster.watch_audit import WatchAuditor
from sailvl_operator.cluster.workqueue import QueueConfig, WorkQueue
from sailvl_operator.controller import Controller
from sailvl_operator.errors import NotFound
from sailvl_operator.health import HealthServer
from sailvl_operator.metrics import Metrics, OperatorCollector
from sailvl_operator.metrics_page import MIN_OPERATOR_REUSE_SECONDS, MetricsPage
from sailvl_operator.run_series import RunCollector, RunStatus
from sailvl_operator.settings import OperatorSettings

log = logging.getLogger(__name__)

_CRD_POLL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerParts:
    """A controller and everything that it works with, built but not running."""

    controller: Controller
    runs: RunStore
    queue: WorkQueue[RunKey]
    owned_objects: OwnedObjects
    auditor: WatchAuditor
    recorder: Recorder
    progress: ProgressReader
    diagnostics: StartDiagnostics

    def on_run_event(self, type_: str | None, raw: dict[str, Any]) -> None:
        """Handle an event of the watch of runs; without a type, an object from a list."""
        handlers.handle_run_event(type_, raw, self.runs, self.queue)


def build_controller(
    settings: OperatorSettings,
    client: Client,
    *,
    clock: Callable[[], float],
    monotonic: Callable[[], float] = time.monotonic,
    metrics: Metrics | None = None,
    queue_config: QueueConfig | None = None,
    diagnostics_delay_seconds: float = DELAY_SECONDS,
    has_backpressure: Callable[[], bool] | None = None,
) -> ControllerParts:
    """Build a controller that works through `client`.

    `clock`: Unix seconds, comparable with times of the API server. `has_backpressure`: whether writes that can wait are
    deferred; defaults to a high start-up backlog. The other arguments replace what the operator runs with.
    """

    def should_defer(namespace: str) -> bool:
        return has_backpressure() if has_backpressure is not None else backlog.is_high(namespace)

    shared = _Shared(
        settings=settings,
        client=client,
        clock=clock,
        monotonic=monotonic,
        metrics=metrics or Metrics(CollectorRegistry()),
        has_backpressure=should_defer,
        runs=RunStore(EditLimit(monotonic)),
        queue=WorkQueue(
            queue_config,
            group_by=itemgetter(0),
            has_backpressure=lambda key: should_defer(key[0]),
            monotonic=monotonic,
        ),
    )
    owned_objects = _build_owned_objects(shared)
    diagnostics = _build_diagnostics(shared, owned_objects, diagnostics_delay_seconds)
    backlog = StartupBacklog(owned_objects, get_obstacles=diagnostics.get, clock=clock)
    return _build_parts(shared, owned_objects, diagnostics)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shared:
    """Objects that several parts are built with."""

    settings: OperatorSettings
    client: Client
    clock: Callable[[], float]
    monotonic: Callable[[], float]
    metrics: Metrics
    has_backpressure: Callable[[str], bool]
    runs: RunStore
    queue: WorkQueue[RunKey]


def _build_parts(shared: _Shared, owned_objects: OwnedObjects, diagnostics: StartDiagnostics) -> ControllerParts:
    recorder = _build_recorder(shared)
    progress = _build_progress_reader(shared, owned_objects)
    return ControllerParts(
        controller=_build_controller(shared, owned_objects, progress, diagnostics, recorder),
        runs=shared.runs,
        queue=shared.queue,
        owned_objects=owned_objects,
        auditor=_build_auditor(shared),
        recorder=recorder,
        progress=progress,
        diagnostics=diagnostics,
    )


def _build_owned_objects(shared: _Shared) -> OwnedObjects:
    return OwnedObjects(
        shared.client,
        namespaces=shared.settings.api.namespaces,
        on_change=shared.queue.add_debounced,
        on_routine_change=partial(shared.queue.add_debounced, routine=True),
        count_restart=lambda resource, cause: shared.metrics.watch_restarts.labels(resource, cause).inc(),
        clock=shared.clock,
        metrics_peers=shared.settings.defaults.metrics_peers,
        count_error=shared.metrics.count_loop_error,
        find_run=shared.runs.get_unfinished,
    )


def _build_auditor(shared: _Shared) -> WatchAuditor:
    return WatchAuditor(
        shared.client,
        shared.runs,
        namespaces=shared.settings.api.namespaces,
        interval_seconds=shared.settings.controller.watch_audit_interval_seconds,
        on_event=partial(handlers.handle_run_event, runs=shared.runs, queue=shared.queue),
        count=shared.metrics.missed_changes.inc,
        monotonic=shared.monotonic,
        count_error=shared.metrics.count_loop_error,
    )


def _build_recorder(shared: _Shared) -> Recorder:
    return Recorder(
        shared.client,
        identity=shared.settings.lease.identity,
        enabled=shared.settings.api.events,
        count=lambda outcome: shared.metrics.events.labels(outcome).inc(),
        clock=shared.clock,
        has_backpressure=shared.has_backpressure,
        count_error=shared.metrics.count_loop_error,
    )


def _build_progress_reader(shared: _Shared, owned_objects: OwnedObjects) -> ProgressReader:
    return ProgressReader(
        interval_seconds=shared.settings.controller.progress_interval_seconds,
        pods=lambda: find_readable(owned_objects, shared.runs),
        on_change=shared.queue.add,
        count=lambda outcome: shared.metrics.progress_reads.labels(outcome).inc(),
        has_backpressure=shared.has_backpressure,
        monotonic=shared.monotonic,
        count_error=shared.metrics.count_loop_error,
        count_omitted=shared.metrics.omitted_metrics.inc,
    )


def _build_diagnostics(shared: _Shared, owned_objects: OwnedObjects, delay_seconds: float) -> StartDiagnostics:
    return StartDiagnostics(
        shared.client,
        interval_seconds=shared.settings.controller.diagnostics_interval_seconds,
        find_attempts=lambda: find_waiting(owned_objects, shared.runs),
        on_change=shared.queue.add,
        delay_seconds=delay_seconds,
        monotonic=shared.monotonic,
        count_error=shared.metrics.count_loop_error,
    )


def _build_controller(
    shared: _Shared,
    owned_objects: OwnedObjects,
    progress: ProgressReader,
    diagnostics: StartDiagnostics,
    recorder: Recorder,
) -> Controller:
    return Controller(
        client=shared.client,
        runs=shared.runs,
        owned_objects=owned_objects,
        progress=progress,
        diagnostics=diagnostics,
        recorder=recorder,
        queue=shared.queue,
        metrics=shared.metrics,
        defaults=shared.settings.defaults,
        allowed=shared.settings.allowed,
        clock=shared.clock,
    )


class App:
    """One operator process, with kopf, leader election and the health server."""

    def __init__(
        self, settings: OperatorSettings, credentials: Credentials, *, client_config: ClientConfig | None = None
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        registry, clock = CollectorRegistry(), ServerClock()
        metrics = self._metrics = Metrics(registry)
        self._client = Client(
            credentials,
            client_config,
            clock=clock,
            on_response=lambda verb, status: metrics.api_calls.labels(verb, str(status)).inc(),
        )
        self.parts = build_controller(settings, self._client, clock=clock.now, metrics=metrics)
        self.leadership = Leadership(self._client, settings.lease, clock=clock.now)
        page, operator_page = self._build_metrics_pages(registry)
        self.server = HealthServer(
            settings.health,
            page,
            operator_page=operator_page,
            liveness=self._liveness_errors,
            readiness=self._readiness_errors,
        )

    def _build_metrics_pages(self, registry: CollectorRegistry) -> tuple[MetricsPage, MetricsPage]:
        """Return the page of all metrics and the page of those of the operator alone."""
        operator = OperatorCollector(
            queue=lambda: (self.parts.queue.depth(), self.parts.queue.oldest_seconds()),
            watches=self.parts.owned_objects.ages,
            is_leading=self._is_leading,
        )
        runs, run_registry = RunCollector(self._leader_statuses), CollectorRegistry()
        registry.register(operator)
        run_registry.register(runs)

        def take_snapshot() -> None:
            operator.take_snapshot()
            runs.take_snapshot()

        return (
            MetricsPage(registry, run_registry, take_snapshot=take_snapshot),
            MetricsPage(registry, take_snapshot=operator.take_snapshot, min_reuse_seconds=MIN_OPERATOR_REUSE_SECONDS),
        )

    async def serve(self) -> None:
        """Run until cancelled, until kopf ends by a signal, or until a part fails.

        Raises an exception group with the error of the part.
        """
        async with self._client, self.server:
            log.info("serving /metrics, /healthz and /readyz", extra={"port": self.server.port})
            await self._run_parts()

    async def _run_parts(self) -> None:
        """Run the watches from the start, also on a standby; run the controller only while this replica leads."""
        try:
            async with asyncio.TaskGroup() as group:
                audit = keep_running("watch-audit", self.parts.auditor.run, self._metrics.count_loop_error)
                parts = self.parts.owned_objects.run(), audit, self._lead()
                tasks = [group.create_task(part) for part in parts]

                def stop() -> None:
                    for task in tasks:
                        task.cancel()

                await self._run_kopf(stop)
                stop()
        finally:
            await self.leadership.release()

    async def _run_kopf(self, on_stop: Callable[[], None]) -> None:
        await self._wait_for_crd()
        namespaces = self._settings.api.namespaces
        registry = handlers.build_registry(
            self.parts.on_run_event,
            self._credentials,
            is_known=self.parts.runs.is_known,
            on_stop=on_stop,
            count_error=self._metrics.count_loop_error,
        )
        await kopf.operator(registry=registry, standalone=True, clusterwide=not namespaces, namespaces=namespaces)

    async def _wait_for_crd(self) -> None:
        """Wait until the CustomResourceDefinition exists. kopf looks it up once, when it starts."""
        scope = next(iter(self._settings.api.namespaces), "")
        while True:
            try:
                await self._client.check_exists(resources.RUNS, scope)
                return
            except NotFound:
                log.warning("CustomResourceDefinition of %s not found, waiting for it to be applied", names.KIND)
                await asyncio.sleep(_CRD_POLL_SECONDS)

    async def _lead(self) -> None:
        is_elected = self._settings.lease.enabled
        if is_elected:
            await self.leadership.acquire()
        async with asyncio.TaskGroup() as group:
            if is_elected:
                group.create_task(self.leadership.keep())
            for loop, run in (
                ("recorder", self.parts.recorder.run),
                ("progress", self.parts.progress.run),
                ("start-diagnostics", self.parts.diagnostics.run),
            ):
                group.create_task(keep_running(loop, run, self._metrics.count_loop_error))
            group.create_task(self.parts.controller.run(self._settings.controller.workers))

    def _liveness_errors(self) -> list[str]:
        return health.liveness_errors(
            silent_watches=self.parts.owned_objects.ages(),
            missing_events_seconds=self.parts.auditor.stale_seconds(),
            stalled_seconds=self.parts.queue.stalled_seconds() if self._is_leading() else 0.0,
        )

    def _readiness_errors(self) -> list[str]:
        objects = self.parts.owned_objects
        return health.readiness_errors(
            is_synced=objects.is_synced(), missing_permissions=objects.find_missing_permissions()
        )

    def _is_leading(self) -> bool:
        return self.leadership.is_leading or not self._settings.lease.enabled

    def _leader_statuses(self) -> Iterator[RunStatus]:
        """Yield the status of every run; none on a standby, so that each run has its series once."""
        if self._is_leading():
            yield from self.parts.runs.statuses()
