"""An operator process without kopf and without a process of its own: it can be killed at any point and loses its
memory.

Built like the real one, by `app.build_controller`. Used by the random walk and by the crash points.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from prometheus_client import CollectorRegistry

from sailvl_operator.api.types import Defaults
from sailvl_operator.app import build_controller
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.workqueue import QueueConfig
from sailvl_operator.errors import ApiError, Gone
from sailvl_operator.metrics import Metrics
from sailvl_operator.settings import ApiSettings, ControllerSettings, LeaseSettings, OperatorSettings

_WORKERS = 2
_WATCH_AUDIT_SECONDS = 180.0


class OperatorProcess:
    """One life of an operator; a new object is a new process with an empty memory.

    `read_progress`: called with the reader every `progress_seconds`, in place of reads over the network.
    """

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
        backoff_seconds: float = 0.5,
        backoff_limit_seconds: float = 60.0,
        has_backpressure: Callable[[], bool] = lambda: False,
    ) -> None:
        self.client, self.namespaces = client, tuple(namespaces)
        settings = OperatorSettings(
            api=ApiSettings(namespaces=self.namespaces),
            controller=ControllerSettings(
                diagnostics_interval_seconds=progress_seconds, watch_audit_interval_seconds=_WATCH_AUDIT_SECONDS
            ),
            lease=LeaseSettings(identity="test"),
            defaults=defaults,
        )
        self._metrics = Metrics(CollectorRegistry())
        self.parts = build_controller(
            settings,
            client,
            clock=clock,
            monotonic=monotonic,
            metrics=self._metrics,
            queue_config=QueueConfig(
                backoff_seconds=backoff_seconds, backoff_limit_seconds=backoff_limit_seconds, debounce_seconds=0.0
            ),
            has_backpressure=has_backpressure,
        )
        self.queue = self.parts.queue
        self._read_progress, self._progress_seconds = read_progress, progress_seconds
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all tasks of the process."""
        parts = self.parts
        running = [parts.owned_objects.run(), parts.auditor.run(), parts.recorder.run(), parts.diagnostics.run()]
        running += [parts.controller.run(_WORKERS)]
        running += [self._watch_runs(scope) for scope in self.namespaces or ("",)]
        if self._read_progress is not None:
            running.append(self._read_rounds(self._read_progress))
        self._tasks = [asyncio.ensure_future(task) for task in running]

    async def kill(self) -> None:
        """End all tasks without any cleanup."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self.parts.runs:
            self.queue.cancel_timer((entry.run.namespace, entry.run.name))

    def check(self) -> None:
        """Raise the error of a task that has ended, since tasks only end by `kill`. Fail if a loop contained one."""
        for metric in self._metrics.loop_errors.collect():
            errors = {s.labels["loop"]: s.value for s in metric.samples if s.name.endswith("_total") and s.value}
            assert not errors, f"unexpected errors in background loops, see the log: {errors}"
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_coro()} ended")

    async def _read_rounds(self, read: Callable[[ProgressReader], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._progress_seconds)
            await read(self.parts.progress)

    async def _watch_runs(self, namespace: str) -> None:
        """Watch runs as kopf does: list them, pass them on without a type, then watch; list again if the version has
        expired. A deletion between a watch and the next list is not reported."""
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list_runs(namespace)
                async for type_, raw in self.client.watch(resources.RUNS, namespace, resource_version=version):
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        self.parts.on_run_event(type_, raw)
            except Gone:
                version = ""
            except ApiError:
                pass
            await asyncio.sleep(0.1)

    async def _list_runs(self, namespace: str) -> str:
        version = ""
        async for items, version in self.client.list_pages(resources.RUNS, namespace):  # noqa: B007
            for raw in items:
                self.parts.on_run_event(None, raw)
        return version
