"""`sailvl operator`: puts the parts together, runs them in one event loop, and ends when any of them does."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import kopf
import uvloop
from prometheus_client import CollectorRegistry

from sailvl_operator import handlers
from sailvl_operator.api import names
from sailvl_operator.api.status import decode_status
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.backpressure import StartupBacklog
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials, load_credentials
from sailvl_operator.cluster.lease import Leadership
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.cluster.server_clock import ServerClock
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics, find_waiting
from sailvl_operator.cluster.watch_audit import WatchAuditor
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.controller import Controller, handle_run_event
from sailvl_operator.errors import NotFound, OperatorError
from sailvl_operator.health import Server
from sailvl_operator.metrics import Metrics, OperatorCollector, RunCollector
from sailvl_operator.settings import OPTIONS, Settings, describe, read_settings

log = logging.getLogger("sailvl_operator")

_DEFINITION_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag an option; each may come from its environment variable instead."""
    for option in OPTIONS:
        parser.add_argument(option.flag, help=f"{option.help} (or {option.variable})", default=None)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped. 0: stopped by a signal; 1: something failed or the lease is lost; 2: bad settings."""
    try:
        settings = read_settings(args, os.environ)
        _configure_logging(settings)
        credentials = load_credentials(settings.api.kubeconfig, settings.api.context)
    except OperatorError as error:
        print(f"sailvl operator: {error}", file=sys.stderr)
        return 2
    log.info("starting", extra={"settings": describe(settings), "server": credentials.server})
    code = 0
    _tame_collector()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Operator(settings, credentials).serve())
    except* OperatorError as group:
        log.error("the operator ends: %s", _words(group))
        code = 1
    return code


def _tame_collector() -> None:
    """What is imported stays; the rest is freed by counting references, so that cycles are looked for now and then."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Operator:
    """All parts of one process."""

    def __init__(
        self, settings: Settings, credentials: Credentials, *, client_config: ClientConfig | None = None
    ) -> None:
        self.settings = settings
        self.credentials = credentials
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.runs = RunStore()
        self.queue: WorkQueue[RunKey] = WorkQueue(
            backoff_seconds=settings.queue.backoff,
            backoff_limit_seconds=settings.queue.backoff_limit,
            debounce_seconds=settings.queue.batch,
            has_backpressure=self._has_backpressure,
        )
        self.clock = ServerClock()
        self.client = Client(credentials, client_config, clock=self.clock, on_response=self._count_call)
        self.children = Children(
            self.client,
            namespaces=settings.api.namespaces,
            on_change=self.queue.add_debounced,
            on_routine_change=lambda key: self.queue.add_debounced(key, routine=True),
            count_restart=lambda resource, cause: self.metrics.watch_restarts.labels(resource, cause).inc(),
            clock=self.clock.now,
        )
        self.rush = StartupBacklog(self.children, clock=self.clock.now)
        self.resync = WatchAuditor(
            self.client,
            self.runs,
            namespaces=settings.api.namespaces,
            interval=settings.api.resync,
            tell=self._see_run,
            count=self.metrics.missed_changes.inc,
        )
        self.leadership = Leadership(self.client, settings.lease, clock=self.clock.now)
        self.server = Server(settings.server, self.registry, is_alive=self.find_problems, is_ready=self.find_unready)
        self._register_collectors()

    async def serve(self) -> None:
        """Until a signal comes or a part fails."""
        async with self.client, self.server:
            log.info("serving /metrics, /healthz and /readyz", extra={"port": self.server.port})
            await self._run_all()

    async def _run_all(self) -> None:
        """The watches run from the start, also in a replica that waits; the engine only while it leads."""
        try:
            async with asyncio.TaskGroup() as group:
                parts = self.children.run(), self.resync.run(), self._lead()
                background = [group.create_task(part) for part in parts]

                def stop() -> None:
                    for task in background:
                        task.cancel()

                await self._run_kopf(stop)
                stop()
        finally:
            await self.leadership.release()

    async def _run_kopf(self, on_stop: Callable[[], None]) -> None:
        await self._wait_for_definition()
        namespaces = self.settings.api.namespaces
        registry = handlers.build_registry(
            self._see_run,
            self.credentials,
            is_known=self.runs.is_known,
            watch_timeout=self.settings.api.watch_timeout,
            on_stop=on_stop,
        )
        await kopf.operator(registry=registry, standalone=True, clusterwide=not namespaces, namespaces=namespaces)

    def _see_run(self, type_: str | None, raw: dict[str, Any]) -> None:
        handle_run_event(type_, raw, self.runs, self.queue)

    async def _wait_for_definition(self) -> None:
        """kopf looks for the resource once, at its start: without the definition it would never see a run."""
        scope = next(iter(self.settings.api.namespaces), "")
        while True:
            try:
                await anext(self.client.list_pages(resources.RUNS, scope))
                return
            except NotFound:
                log.warning("there is no CustomResourceDefinition of %s yet; apply it", names.KIND)
                await asyncio.sleep(_DEFINITION_SECONDS)

    async def _lead(self) -> None:
        recorder, progress, complaints = self._build_recorder(), self._build_progress(), self._build_complaints()
        engine = Controller(
            client=self.client,
            runs=self.runs,
            children=self.children,
            progress=progress,
            complaints=complaints,
            recorder=recorder,
            queue=self.queue,
            metrics=self.metrics,
            defaults=self.settings.defaults,
            clock=self.clock.now,
        )
        if self.settings.lease.enabled:
            await self.leadership.acquire()
        async with asyncio.TaskGroup() as group:
            if self.settings.lease.enabled:
                group.create_task(self.leadership.keep())
            group.create_task(recorder.run())
            group.create_task(progress.run())
            group.create_task(complaints.run())
            group.create_task(engine.run(self.settings.queue.workers))

    def _build_recorder(self) -> Recorder:
        return Recorder(
            self.client,
            identity=self.settings.lease.identity,
            enabled=self.settings.api.events,
            count=lambda outcome: self.metrics.events.labels(outcome).inc(),
            clock=self.clock.now,
            has_backpressure=self._has_backpressure,
        )

    def _build_progress(self) -> ProgressReader:
        return ProgressReader(
            self.settings.progress,
            pods=lambda: self.children.pods,
            on_change=self.queue.add,
            count=lambda outcome: self.metrics.progress_reads.labels(outcome).inc(),
            has_backpressure=self._has_backpressure,
        )

    def _build_complaints(self) -> StartDiagnostics:
        return StartDiagnostics(
            self.client,
            self.settings.complaints,
            subjects=lambda: find_waiting(self.children, self.runs),
            on_change=self.queue.add,
        )

    def find_problems(self) -> list[str]:
        """Why the kubelet should start this process again; nothing when all is well."""
        limits, found = self.settings.server, []
        for resource, age in self.children.ages():
            if age > limits.stale_watch:
                found.append(f"the watch of {resource} has been silent for {age:.0f} s")
        if self.resync.stale_seconds() > limits.stale_runs:
            found.append(f"the watch of runs has missed changes for {self.resync.stale_seconds():.0f} s")
        if self._is_leading() and self.queue.oldest_seconds() > limits.stale_queue:
            found.append(f"a key has waited for {self.queue.oldest_seconds():.0f} s")
        return found

    def find_unready(self) -> list[str]:
        """Why this process isn't ready: a standby is, once it has seen everything."""
        return [] if self.children.is_synced() else ["the first lists are not complete"]

    def _has_backpressure(self) -> bool:
        return self.rush.is_high()

    def _is_leading(self) -> bool:
        return self.leadership.is_leading or not self.settings.lease.enabled

    def _count_call(self, verb: str, code: int) -> None:
        self.metrics.api_calls.labels(verb, str(code)).inc()

    def _register_collectors(self) -> None:
        self.registry.register(
            OperatorCollector(
                queue=lambda: (self.queue.depth(), self.queue.oldest_seconds()),
                watches=self.children.ages,
                is_leading=self._is_leading,
            )
        )
        self.registry.register(
            RunCollector(
                lambda: (
                    ((e.run.namespace, e.run.name, decode_status(e.run.status)) for e in self.runs)
                    if self._is_leading()
                    else ()
                )
            )
        )


def _words(error: BaseException) -> str:
    """The errors inside of nested groups."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_words(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {error}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with whatever identity is bound to the record."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self._own}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _configure_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    formatter = (
        JsonFormatter() if settings.log_format == "json" else logging.Formatter("%(asctime)s %(name)s %(message)s")
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for chatty in ("kopf", "kubernetes", "aiohttp"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
