"""A controller against the fake API server; the test plays kopf, the Job controller and the kubelet."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.status import decode_status
from sailvl_operator.api.types import Defaults
from sailvl_operator.app import build_controller
from sailvl_operator.cluster.client import Client, ClientConfig
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.cluster.workqueue import QueueConfig
from sailvl_operator.settings import LeaseSettings, OperatorSettings
from tests.support.apiserver.http import AnonymousConfiguration, FakeApiServer, serve
from tests.support.apiserver.store import NEW_YEAR_2026
from tests.support.builders.operator import build_document

KEY = ("team", "demo")
SETTINGS = OperatorSettings(
    lease=LeaseSettings(identity="test"), defaults=Defaults(failure_settle_seconds=0.05, backoff_seconds=0.01)
)
QUEUE_CONFIG = QueueConfig(backoff_seconds=0.01, backoff_limit_seconds=0.05, debounce_seconds=0.0)


class ControllerWorld:
    """A controller that gets the runs of the API server as it would from kopf. Its clock starts in 2026."""

    def __init__(self, api: FakeApiServer, client: Client, settings: OperatorSettings = SETTINGS) -> None:
        self.api, self.client = api, client
        started = time.monotonic()
        self.has_backpressure = False
        self.parts = build_controller(
            settings,
            client,
            clock=lambda: NEW_YEAR_2026 + time.monotonic() - started,
            queue_config=QUEUE_CONFIG,
            diagnostics_delay_seconds=0.0,
            has_backpressure=lambda: self.has_backpressure,
        )
        self.runs, self.queue, self.owned_objects = self.parts.runs, self.parts.queue, self.parts.owned_objects
        self.controller, self.diagnostics = self.parts.controller, self.parts.diagnostics

    async def apply(self, document: dict[str, Any]) -> None:
        """Apply a document as kubectl does, and pass the watch event on."""
        old = self.api.objects.get("sailvlruns", {}).get(KEY)
        if old is not None:
            document = {**copy.deepcopy(old), "spec": document["spec"]}
            document["metadata"]["generation"] += 1
        self.send_event(self.api.put("sailvlruns", document))

    def send_event(self, raw: dict[str, Any], type_: str = "MODIFIED") -> None:
        """Pass a watch event of a run on."""
        self.parts.on_run_event(type_, copy.deepcopy(raw))

    @property
    def run(self) -> dict[str, Any]:
        return self.api.objects["sailvlruns"][KEY]

    @property
    def status(self):
        return decode_status(self.run.get("status", {}))

    def states(self) -> dict[str, tuple[str, int]]:
        return defaultdict(lambda: ("", 0), {s.name: (s.state, s.attempt) for s in self.status.stages})

    async def add_pods(self, stage: str, attempt: int = 1, nodes: int = 1, phase: str = "Running") -> None:
        """Create the pods of an attempt, as the Job controller and the kubelet do."""
        for index in range(nodes):
            self.add_pod(stage, attempt, index, phase)

    def add_pod(self, stage: str, attempt: int, index: int, phase: str) -> dict[str, Any]:
        """Create or replace one pod of an attempt's Job, and return it."""
        return self.api.put("pods", self._make_pod(stage, attempt, index, phase))

    def _make_pod(self, stage: str, attempt: int, index: int, phase: str) -> dict[str, Any]:
        job = self.api.objects["jobs"][KEY[0], names.job_name("demo", stage, attempt)]
        return make_pod(stage, attempt, index, phase, job_uid=job["metadata"]["uid"])

    async def end_pod(self, stage: str, attempt: int, index: int, code: int, **message: Any) -> None:
        pod = self._make_pod(stage, attempt, index, "Failed" if code else "Succeeded")
        termination = json.dumps({"exit_code": code, **message})
        pod["status"]["containerStatuses"] = [
            {"name": names.CONTAINER, "state": {"terminated": {"exitCode": code, "message": termination}}}
        ]
        self.api.put("pods", pod)

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.01)

    async def until_idle(self) -> None:
        """Wait until no key has been queued or reconciled for a moment."""
        quiet = 0
        while quiet < 5:
            await asyncio.sleep(0.01)
            quiet = 0 if self.queue.depth() or self.queue._active else quiet + 1


def make_pod(stage: str, attempt: int, index: int, phase: str, *, job_uid: str) -> dict[str, Any]:
    """Build the pod of an attempt's Job, which has this UID."""
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
        "metadata": {
            "name": f"{job}-{index}-x",
            "namespace": "team",
            "labels": labels,
            "ownerReferences": [{"kind": "Job", "name": job, "uid": job_uid, "controller": True}],
        },
        "spec": {"nodeName": f"node-{index}"},
        "status": {"phase": phase, "conditions": conditions},
    }


@asynccontextmanager
async def running(settings: OperatorSettings = SETTINGS):
    api = FakeApiServer()
    async with (
        serve(api) as url,
        Client(Credentials(AnonymousConfiguration(url)), ClientConfig(backoff_seconds=0.001)) as client,
    ):
        world = ControllerWorld(api, client, settings)
        parts = [world.owned_objects.run(), world.parts.recorder.run(), world.controller.run(2)]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            yield world
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def build_two_worker_document() -> dict[str, Any]:
    """Build a valid run with two workers in its first stage."""
    document = build_document()
    document["spec"]["stages"][0]["workers"] = {"nodes": 2}
    return document
