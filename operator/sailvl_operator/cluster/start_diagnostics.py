"""Why attempts don't start, in the words of who holds them back; the engine shows them in the Stuck condition.

What the API server refuses is noted by the engine. What others refuse later (a quota or a webhook the Job's pods, a
kubelet a volume, Kueue a place) stands in events and workloads, which are read for the attempts that wait too long.
Best effort and bounded: a read that fails means nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.status import Status, decode_status
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.core.observe import JobRecord, PodRecord
from sailvl_operator.errors import ApiError, NotFound
from sailvl_operator.settings import DiagnosticsSettings

Attempt = tuple[str, int]
"""stage, attempt"""
Subject = tuple[JobRecord, tuple[PodRecord, ...]]
"""A Job and its pods."""


class StartDiagnostics:
    """Words by run, stage and attempt."""

    def __init__(
        self,
        client: Client,
        settings: DiagnosticsSettings,
        *,
        subjects: Callable[[], Iterable[Subject]],
        on_change: Callable[[RunKey], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._settings = settings
        self._subjects = subjects
        self._on_change = on_change
        self._monotonic = monotonic
        self._refused: dict[RunKey, dict[Attempt, str]] = {}
        self._heard: dict[RunKey, dict[Attempt, str]] = {}
        self._since: dict[str, float] = {}  # Job's uid to when it was first seen waiting
        self._asked: dict[str, float] = {}  # and to when it was last asked about

    def get(self, key: RunKey) -> Mapping[Attempt, str]:
        """What others said last of each attempt of a run."""
        return self._heard.get(key, {})

    def get_refusals(self, key: RunKey) -> Mapping[Attempt, str]:
        """What the API server refuses to each attempt of a run."""
        return self._refused.get(key, {})

    def refuse(self, key: RunKey, words: Mapping[Attempt, str]) -> None:
        """The API server refuses what these attempts need."""
        self._refused[key] = dict(words)

    def accept(self, key: RunKey) -> None:
        """It refuses nothing of the run any more."""
        self._refused.pop(key, None)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        self._refused.pop(key, None)
        self._heard.pop(key, None)

    async def run(self) -> None:
        """Rounds, until cancelled."""
        if not self._settings.interval:
            return
        while True:
            await asyncio.sleep(self._settings.interval)
            await self.read_some()

    async def read_some(self) -> None:
        """One round: those that wait, the longest unasked first."""
        waiting = {job.uid: (job, pods) for job, pods in self._subjects()}
        now = self._monotonic()
        self._since = {uid: self._since.get(uid, now) for uid in waiting}
        self._asked = {uid: self._asked.get(uid, 0.0) for uid in waiting}
        self._drop_all_but({(job.namespace, job.run, job.stage, job.attempt) for job, _ in waiting.values()})
        patient = [uid for uid in waiting if now - self._since[uid] >= self._settings.patience]
        for uid in sorted(patient, key=lambda uid: self._asked[uid])[: self._settings.reads]:
            self._asked[uid] = now
            await self._ask(*waiting[uid])

    def _drop_all_but(self, waiting: set[tuple[str, str, str, int]]) -> None:
        for key, heard in list(self._heard.items()):
            for attempt in [a for a in heard if (*key, *a) not in waiting]:
                self._hear(key, attempt, "")

    async def _ask(self, job: JobRecord, pods: tuple[PodRecord, ...]) -> None:
        try:
            words = await self._listen(job, pods)
        except ApiError:
            return
        self._hear((job.namespace, job.run), (job.stage, job.attempt), words)

    async def _listen(self, job: JobRecord, pods: tuple[PodRecord, ...]) -> str:
        if job.is_suspended:
            return await self._read_workload(job)
        silent = [pod for pod in pods if not pod.is_gone]
        if len(silent) < job.nodes:
            return await self._read_event(job.namespace, job.uid, f"Job {job.name}")
        pod = next((pod for pod in silent if not pod.is_ready), silent[0])
        words = await self._read_event(job.namespace, pod.uid, f"pod {pod.name}")
        if words or pod.node:
            return words
        return f"pod {pod.name} waits for the scheduler {pod.scheduler}, which has said nothing of it"

    async def _read_event(self, namespace: str, uid: str, subject: str) -> str:
        """The newest warning about an object."""
        fields = f"involvedObject.uid={uid},type=Warning"
        found = await self._first_page(resources.EVENTS, namespace, field_selector=fields)
        if not found:
            return ""
        newest = max(found, key=_when)
        return f"{subject}: {newest.get('reason', '')}: {newest.get('message', '')}"

    async def _read_workload(self, job: JobRecord) -> str:
        """Why Kueue doesn't let a Job go."""
        selector = f"{names.LABEL_KUEUE_JOB}={job.uid}"
        found = await self._read_workloads(job.namespace, selector)
        conditions = [c for workload in found for c in workload.get("status", {}).get("conditions", [])]
        held = next((c for c in conditions if c["type"] == "QuotaReserved" and c["status"] == "False"), None)
        return f"Kueue's queue {job.queue}: {held['message']}" if held is not None else ""

    async def _read_workloads(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """By the newest version that this Kueue serves."""
        *newer, oldest = resources.WORKLOADS
        for resource in newer:
            try:
                return await self._first_page(resource, namespace, selector=selector)
            except NotFound:
                continue
        return await self._first_page(oldest, namespace, selector=selector)

    async def _first_page(
        self, resource: resources.Resource, namespace: str, *, selector: str = "", field_selector: str = ""
    ) -> list[dict[str, Any]]:
        pages = self._client.list_pages(resource, namespace, selector=selector, field_selector=field_selector)
        async for items, _ in pages:
            return items
        return []

    def _hear(self, key: RunKey, attempt: Attempt, words: str) -> None:
        heard = self._heard.get(key, {})
        if heard.get(attempt, "") == words:
            return
        self._heard[key] = {a: w for a, w in (heard | {attempt: words}).items() if w}
        if not self._heard[key]:
            del self._heard[key]
        self._on_change(key)


def find_waiting(children: Children, runs: RunStore) -> Iterator[Subject]:
    """The current attempts that have yet to start."""
    for job in [job for job in children.jobs if not job.is_gone]:
        key = job.namespace, job.run
        pods = tuple(p for p in children.pods.get(key) if (p.stage, p.attempt) == (job.stage, job.attempt))
        entry = runs.get(key)
        if entry is not None and is_waiting(job, pods) and is_current(decode_status(entry.run.status), job):
            yield job, pods


def is_current(status: Status, job: JobRecord) -> bool:
    """Whether a Job is its stage's newest attempt and should start."""
    return any(
        (s.name, s.attempt) == (job.stage, job.attempt) and s.state in ("Starting", "Restarting") for s in status.stages
    )


def is_waiting(job: JobRecord, pods: Iterable[PodRecord]) -> bool:
    """Whether an attempt has yet to start, and no pod of it says why."""
    there = [pod for pod in pods if not pod.is_gone]
    if job.is_deleting or any(pod.terminated is not None or pod.unschedulable for pod in there):
        return False
    return len(there) < job.nodes or any(pod.phase == "Pending" for pod in there)


def _when(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")
