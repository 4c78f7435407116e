"""An operator's engine against the fake API server, and the test in the place of kopf, Job controller and kubelet."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from sailvl_operator.api import names
from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import decode_status
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.progress import ProgressReader
from sailvl_operator.cluster.recorder import Recorder
from sailvl_operator.cluster.runs import RunStore
from sailvl_operator.cluster.start_diagnostics import StartDiagnostics, find_waiting
from sailvl_operator.cluster.workqueue import WorkQueue
from sailvl_operator.controller import Controller, handle_run_event
from sailvl_operator.metrics import Metrics
from sailvl_operator.settings import DiagnosticsSettings, ProgressSettings
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.apiserver.store import NEW_YEAR_2026

KEY = ("team", "demo")


class World:
    """An operator's engine, fed with the API server's runs as kopf would."""

    def __init__(self, api: FakeApiServer, client: Client) -> None:
        self.api, self.client = api, client
        started = time.monotonic()
        self.clock = lambda: NEW_YEAR_2026 + time.monotonic() - started
        self.runs = RunStore()
        self.metrics = Metrics(CollectorRegistry())
        self.queue: WorkQueue = WorkQueue(backoff_seconds=0.01, backoff_limit_seconds=0.05)
        self.children = Children(
            client, namespaces=(), on_change=self.queue.add, count_restart=lambda *_: None, clock=self.clock
        )
        self.recorder = Recorder(client, identity="test", enabled=True, count=lambda _: None, clock=self.clock)
        self.progress = ProgressReader(
            ProgressSettings(), pods=lambda: self.children.pods, on_change=self.queue.add, count=lambda _: None
        )
        self.complaints = StartDiagnostics(
            client,
            DiagnosticsSettings(patience=0.0),
            subjects=lambda: find_waiting(self.children, self.runs),
            on_change=self.queue.add,
        )
        self.controller = Controller(
            client=client,
            runs=self.runs,
            children=self.children,
            progress=self.progress,
            complaints=self.complaints,
            recorder=self.recorder,
            queue=self.queue,
            metrics=self.metrics,
            defaults=Defaults(failure_settle_seconds=0.05, backoff_seconds=0.01),
            clock=self.clock,
        )

    async def apply(self, document: dict[str, Any]) -> None:
        """kubectl apply, and the watch event of it."""
        old = self.api.objects.get("sailvlruns", {}).get(KEY)
        if old is not None:
            document = {**copy.deepcopy(old), "spec": document["spec"]}
            document["metadata"]["generation"] += 1
        self.see(self.api.put("sailvlruns", document))

    def see(self, raw: dict[str, Any], type_: str = "MODIFIED") -> None:
        handle_run_event(type_, copy.deepcopy(raw), self.runs, self.queue)

    @property
    def run(self) -> dict[str, Any]:
        return self.api.objects["sailvlruns"][KEY]

    @property
    def status(self):
        return decode_status(self.run.get("status", {}))

    def states(self) -> dict[str, tuple[str, int]]:
        return defaultdict(lambda: ("", 0), {s.name: (s.state, s.attempt) for s in self.status.stages})

    async def add_pods(self, stage: str, attempt: int = 1, nodes: int = 1, phase: str = "Running") -> None:
        """What the Job controller and the kubelet do."""
        for index in range(nodes):
            self.api.put("pods", make_pod(stage, attempt, index, phase))

    async def end_pod(self, stage: str, attempt: int, index: int, code: int, **message: Any) -> None:
        pod = make_pod(stage, attempt, index, "Failed" if code else "Succeeded")
        words = json.dumps({"exit_code": code, **message})
        pod["status"]["containerStatuses"] = [
            {"name": names.CONTAINER, "state": {"terminated": {"exitCode": code, "message": words}}}
        ]
        self.api.put("pods", pod)

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.01)

    async def settled(self) -> None:
        """Until nothing is queued or worked on for a moment."""
        quiet = 0
        while quiet < 5:
            await asyncio.sleep(0.01)
            quiet = 0 if self.queue.depth() or self.queue._active else quiet + 1


def make_pod(stage: str, attempt: int, index: int, phase: str) -> dict[str, Any]:
    job = names.job_name("demo", stage, attempt)
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_RUN: "demo",
        names.LABEL_STAGE: stage,
        names.LABEL_ATTEMPT: str(attempt),
        names.LABEL_COMPLETION_INDEX: str(index),
        names.LABEL_JOB_NAME: job,
    }
    conditions = [{"type": "Ready", "status": "True" if phase == "Running" else "False"}]
    return {
        "metadata": {"name": f"{job}-{index}-x", "namespace": "team", "labels": labels},
        "spec": {"nodeName": f"node-{index}"},
        "status": {"phase": phase, "conditions": conditions},
    }


@asynccontextmanager
async def running():
    api = FakeApiServer()
    async with (
        serve(api) as url,
        Client(Credentials(AnonymousConfiguration(url)), ClientConfig(backoff_seconds=0.001)) as client,
    ):
        world = World(api, client)
        parts = [world.children.run(), world.recorder.run(), world.controller.run(2)]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            yield world
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
