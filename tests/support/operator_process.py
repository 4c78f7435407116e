"""A whole operator without kopf, kubectl or a process of its own: put together as `cli/operator.py` does, ended at any
point with all that it remembers. Used by the random walk and by the crash points.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics, find_waiting
from sailvl_operator.cluster.watch_audit import WatchAuditor
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.controller import Controller, handle_run_event
from sailvl_operator.errors import ApiError, Gone
from sailvl_operator.metrics import Metrics
from sailvl_operator.settings import DiagnosticsSettings, ProgressSettings

_WORKERS = 2
_RESYNC_SECONDS = 180.0


class OperatorProcess:
    """One life of an operator; a new object is a new process with an empty memory."""

    def __init__(
        self,
        client: Client,
        *,
        namespaces: Sequence[str] = (),
        defaults: Defaults,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        read_progress: Callable[[ProgressReader], Awaitable[None]] | None = None,
        progress_seconds: float = 60.0,
        backoff: float = 0.5,
        backoff_limit: float = 60.0,
        has_backpressure: Callable[[], bool] = lambda: False,
    ) -> None:
        self.client, self.namespaces = client, tuple(namespaces)
        self.runs = RunStore()
        self.queue: WorkQueue[RunKey] = WorkQueue(
            backoff_seconds=backoff,
            backoff_limit_seconds=backoff_limit,
            has_backpressure=has_backpressure,
            monotonic=monotonic,
        )
        self.children = Children(
            client,
            namespaces=namespaces,
            on_change=self.queue.add,
            on_routine_change=lambda key: self.queue.add_debounced(key, routine=True),
            count_restart=lambda _resource, _cause: None,
            clock=clock,
        )
        self.resync = WatchAuditor(
            client,
            self.runs,
            namespaces=self.namespaces,
            interval=_RESYNC_SECONDS,
            tell=self._see_run,
            count=lambda: None,
            monotonic=monotonic,
        )
        self.recorder = Recorder(client, identity="test", enabled=True, count=lambda _: None, clock=clock)
        self.progress = ProgressReader(
            ProgressSettings(),
            pods=lambda: self.children.pods,
            on_change=self.queue.add,
            count=lambda _: None,
            monotonic=monotonic,
        )
        self.complaints = StartDiagnostics(
            client,
            DiagnosticsSettings(interval=progress_seconds),
            subjects=lambda: find_waiting(self.children, self.runs),
            on_change=self.queue.add,
            monotonic=monotonic,
        )
        self.controller = Controller(
            client=client,
            runs=self.runs,
            children=self.children,
            progress=self.progress,
            complaints=self.complaints,
            recorder=self.recorder,
            queue=self.queue,
            metrics=Metrics(CollectorRegistry()),
            defaults=defaults,
            clock=clock,
        )
        self._read_progress, self._progress_seconds = read_progress, progress_seconds
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        parts = [self.children.run(), self.resync.run(), self.recorder.run(), self.complaints.run()]
        parts += [self.controller.run(_WORKERS)]
        parts += [self._watch_runs(scope) for scope in self.namespaces or ("",)]
        if self._read_progress is not None:
            parts.append(self._read_rounds(self._read_progress))
        self._tasks = [asyncio.ensure_future(part) for part in parts]

    async def kill(self) -> None:
        """Nothing more is done, and nothing is tidied up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self.runs:
            self.queue.cancel_timer((entry.run.namespace, entry.run.name))

    def check(self) -> None:
        """Raises what ended one of its parts, if one has ended."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_coro()} ended")

    async def _read_rounds(self, read: Callable[[ProgressReader], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._progress_seconds)
            await read(self.progress)

    async def _watch_runs(self, namespace: str) -> None:
        """As kopf does: all runs without a type, then what happens, from the start again when the version is too old.

        What was deleted between a watch and the next list is never told.
        """
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list_runs(namespace)
                async for type_, raw in self.client.watch(resources.RUNS, namespace, resource_version=version):
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        self._see_run(type_, raw)
            except Gone:
                version = ""
            except ApiError:
                pass
            await asyncio.sleep(0.1)

    async def _list_runs(self, namespace: str) -> str:
        version = ""
        async for items, version in self.client.list_pages(resources.RUNS, namespace):  # noqa: B007
            for raw in items:
                self._see_run(None, raw)
        return version

    def _see_run(self, type_: str | None, raw: dict[str, Any]) -> None:
        handle_run_event(type_, raw, self.runs, self.queue)
