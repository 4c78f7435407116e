"""Reads why attempts don't start: Events of their Jobs and pods, and Kueue's Workloads, for the Stuck condition.

Others report there what they refuse after the operator has created the Job: a quota or webhook its pods, the kubelet a
volume, Kueue its admission. Reads are best effort and bounded; a failed read changes nothing, and no round waits for
the reads of the last one.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.status import Reason, Status, decode_status
from sailvl_operator.api.types import Run
from sailvl_operator.api.untrusted import DocumentError, clean_line
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.fair_queue import FairQueue
from sailvl_operator.cluster.fair_tasks import FairTasks
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.core.observe import AttemptKey, JobRecord, Obstacle, PodRecord
from sailvl_operator.core.ownership import is_own_job
from sailvl_operator.errors import ApiError, NotFound

WaitingAttempt = tuple[JobRecord, tuple[PodRecord, ...]]
"""Job and pods of an attempt that has not started."""

DELAY_SECONDS = 10.0
"""Seconds for which an attempt must have been waiting before it is diagnosed; most start within them."""
_MESSAGE_LIMIT = 1024
"""Maximum length of a diagnosis."""
_ATTEMPTS_PER_ROUND = 8
"""Maximum number of attempts that are diagnosed per round, and of one namespace whose diagnoses have not ended.
Namespaces take turns, and within a namespace the attempts come first that were not diagnosed for the longest time."""
_CONCURRENCY = 8
"""Maximum number of concurrent diagnoses."""
_NAMESPACE_CONCURRENCY = 2
"""Maximum number of concurrent diagnoses of one namespace."""
_TIMEOUT_SECONDS = 10.0
"""Seconds after which a diagnosis is given up, with all tries of its requests."""


class StartDiagnostics:
    """Newest diagnosis by run and attempt.

    `interval_seconds`: time between rounds; 0 disables them. `find_attempts`: returns the attempts that have not
    started. `on_change`: called with the run's key when a diagnosis changes. `count_error`: called for each attempt
    that can't be diagnosed.
    """

    def __init__(
        self,
        client: Client,
        *,
        interval_seconds: float,
        find_attempts: Callable[[], Iterable[WaitingAttempt]],
        on_change: Callable[[RunKey], None],
        delay_seconds: float = DELAY_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
        count_error: CountError = ignore_count,
    ) -> None:
        self._client = client
        self._interval_seconds = interval_seconds
        self._find_attempts = find_attempts
        self._on_change = on_change
        self._delay_seconds = delay_seconds
        self._monotonic = monotonic
        self._count_error = count_error
        self._obstacles: dict[RunKey, dict[AttemptKey, Obstacle]] = {}
        self._waiting_since: dict[str, float] = {}  # by the Job's UID
        self._diagnosed_at: dict[str, float] = {}  # by the Job's UID
        self._diagnoses: FairTasks[tuple[str, str], WaitingAttempt] = FairTasks(
            "start-diagnostics",
            self._diagnose,
            group_by=itemgetter(0),
            limit=_CONCURRENCY,
            group_limit=_NAMESPACE_CONCURRENCY,
            count_error=count_error,
        )  # by namespace and the Job's UID
        self._turns: dict[str, int] = {}  # number of the diagnosis that was a namespace's last
        self._turn = 0

    def get(self, key: RunKey) -> Mapping[AttemptKey, Obstacle]:
        """Return the newest diagnosis of each attempt of a run."""
        return self._obstacles.get(key, {})

    def forget(self, key: RunKey) -> None:
        """Remove all diagnoses of a run."""
        self._obstacles.pop(key, None)

    async def run(self) -> None:
        """Diagnose in rounds until cancelled."""
        if not self._interval_seconds:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._diagnoses.run())
            while True:
                await asyncio.sleep(self._interval_seconds)
                with contain_errors("start-diagnostics", self._count_error, subject="a round of diagnoses"):
                    self._add_waiting()

    async def diagnose_waiting(self) -> None:
        """Diagnose one round of waiting attempts, and wait for its end."""
        self._add_waiting()
        await self._diagnoses.drain()

    def _add_waiting(self) -> None:
        """Add one round of waiting attempts, and drop the diagnoses of those that wait no longer."""
        waiting = {job.uid: (job, pods) for job, pods in self._find_attempts()}
        now = self._monotonic()
        self._waiting_since = {uid: self._waiting_since.get(uid, now) for uid in waiting}
        self._diagnosed_at = {uid: self._diagnosed_at.get(uid, 0.0) for uid in waiting}
        self._drop_started({(job.namespace, job.run, job.stage, job.attempt) for job, _ in waiting.values()})
        for uid in self._choose_due({uid: job.namespace for uid, (job, _) in waiting.items()}, now):
            job, pods = waiting[uid]
            self._turn += 1
            self._diagnosed_at[uid], self._turns[job.namespace] = now, self._turn
            self._diagnoses.add((job.namespace, uid), (job, pods))

    def _choose_due(self, namespaces: Mapping[str, str], now: float) -> list[str]:
        """Return the UIDs of the Jobs to diagnose in this round, given the namespaces of all that wait."""
        self._turns = {namespace: self._turns.get(namespace, 0) for namespace in namespaces.values()}
        due = [
            uid
            for uid, namespace in namespaces.items()
            if now - self._waiting_since[uid] >= self._delay_seconds and (namespace, uid) not in self._diagnoses
        ]
        queue: FairQueue[str, None] = FairQueue(namespaces.__getitem__)
        for uid in sorted(due, key=lambda uid: (self._turns[namespaces[uid]], self._diagnosed_at[uid])):
            queue.add(uid, None)
        chosen: list[str] = []
        while len(chosen) < _ATTEMPTS_PER_ROUND and (found := queue.pop_where(self._may_add)):
            chosen.append(found[0])
        return chosen

    def _may_add(self, namespace: str) -> bool:
        return self._diagnoses.count_group((namespace, "")) < _ATTEMPTS_PER_ROUND

    def _drop_started(self, waiting: set[tuple[str, str, str, int]]) -> None:
        for key, obstacles in list(self._obstacles.items()):
            for attempt in [a for a in obstacles if (*key, *a) not in waiting]:
                self._store(key, attempt, None)

    async def _diagnose(self, _: tuple[str, str], attempt: WaitingAttempt) -> None:
        job, pods = attempt
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                obstacle = await self._find_obstacle(job, pods)
        except (ApiError, TimeoutError):
            return
        self._store((job.namespace, job.run), (job.stage, job.attempt), obstacle)

    async def _find_obstacle(self, job: JobRecord, pods: tuple[PodRecord, ...]) -> Obstacle | None:
        """Read the Workload of a suspended Job, else the Events of the Job if it lacks pods, else those of a pod that
        isn't ready."""
        if job.is_suspended:
            return _build_obstacle(await self._read_workload(job))
        existing = [pod for pod in pods if not pod.is_gone]
        if len(existing) < job.nodes:
            return _build_obstacle(await self._read_event(job.namespace, job.uid, f"Job {job.name}"))
        pod = next((pod for pod in existing if not pod.is_ready), existing[0])
        message = await self._read_event(job.namespace, pod.uid, f"pod {pod.name}")
        if message or pod.node:
            return _build_obstacle(message)
        message = f"pod {pod.name} waits for the scheduler {pod.scheduler}, which has not reported anything"
        return _build_obstacle(message, Reason.UNSCHEDULABLE)

    async def _read_event(self, namespace: str, uid: str, subject: str) -> str:
        """Return the newest Warning about an object; empty if there is none."""
        fields = f"involvedObject.uid={uid},type=Warning"
        events = await self._read_first_page(
            resources.EVENTS, namespace, decode_as=resources.CoreEvent, field_selector=fields
        )
        if not events:
            return ""
        newest = max(events, key=_event_time)
        return f"{subject}: {newest.get('reason', '')}: {newest.get('message', '')}"

    async def _read_workload(self, job: JobRecord) -> str:
        """Return why Kueue doesn't admit a Job; empty if it does, or if it doesn't report a reason."""
        selector = f"{names.LABEL_KUEUE_JOB}={job.uid}"
        workloads = await self._list_workloads(job.namespace, selector)
        conditions = [c for workload in workloads for c in workload.get("status", {}).get("conditions", [])]
        pending = next((c for c in conditions if c.get("type") == "QuotaReserved" and c.get("status") == "False"), None)
        return f"Kueue's queue {job.queue}: {pending.get('message', '')}" if pending is not None else ""

    async def _list_workloads(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """List Workloads in the newest API version that the installed Kueue serves."""
        *newer, oldest = resources.WORKLOADS
        for resource in newer:
            try:
                return await self._read_first_page(resource, namespace, decode_as=resources.Workload, selector=selector)
            except NotFound:
                continue
        return await self._read_first_page(oldest, namespace, decode_as=resources.Workload, selector=selector)

    async def _read_first_page(
        self,
        resource: resources.Resource,
        namespace: str,
        *,
        decode_as: resources.ObjectType,
        selector: str = "",
        field_selector: str = "",
    ) -> list[dict[str, Any]]:
        pages = self._client.list_pages(
            resource, namespace, selector=selector, field_selector=field_selector, decode_as=decode_as
        )
        async for page in pages:
            return list(page.items)
        return []

    def _store(self, key: RunKey, attempt: AttemptKey, obstacle: Obstacle | None) -> None:
        """Store a diagnosis, or remove it if there is no obstacle."""
        if self._obstacles.get(key, {}).get(attempt) == obstacle:
            return
        obstacles = self._obstacles.setdefault(key, {})
        if obstacle is not None:
            obstacles[attempt] = obstacle
        else:
            del obstacles[attempt]
        if not obstacles:
            del self._obstacles[key]
        self._on_change(key)


def find_waiting(owned_objects: OwnedObjects, runs: RunStore) -> Iterator[WaitingAttempt]:
    """Yield the current attempts that have not started. Runs whose status can't be read are left out."""
    by_run: dict[RunKey, list[JobRecord]] = defaultdict(list)
    for job in owned_objects.jobs:
        if not job.is_gone and not job.alteration:
            by_run[job.namespace, job.run].append(job)
    for key, jobs in by_run.items():
        entry = runs.get_unfinished(key)
        current = [] if entry is None else _select_current(entry.run, jobs)
        pods: dict[str, list[PodRecord]] = defaultdict(list)
        for pod in owned_objects.pods.get(key) if current else ():
            pods[pod.owner_uid].append(pod)
        yield from ((job, tuple(pods[job.uid])) for job in current if is_waiting(job, pods[job.uid]))


def _select_current(run: Run, jobs: Iterable[JobRecord]) -> list[JobRecord]:
    """Return the Jobs of a run's current attempts; none if the status of the run can't be read."""
    try:
        status = decode_status(run.status)
    except DocumentError:
        return []
    return [job for job in jobs if is_own_job(run, job) and is_current(status, job)]


def is_current(status: Status, job: JobRecord) -> bool:
    """Whether a Job belongs to its stage's newest attempt, and that attempt should start."""
    return any(
        (s.name, s.attempt) == (job.stage, job.attempt) and s.state in ("Starting", "Restarting") for s in status.stages
    )


def is_waiting(job: JobRecord, pods: Iterable[PodRecord]) -> bool:
    """Whether an attempt has not started, and none of its pods already shows why."""
    existing = [pod for pod in pods if not pod.is_gone]
    if job.is_deleting or any(pod.terminated is not None or pod.unschedulable for pod in existing):
        return False
    return len(existing) < job.nodes or any(pod.phase == "Pending" for pod in existing)


def _event_time(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")


def _build_obstacle(message: str, reason: Reason | None = None) -> Obstacle | None:
    """Build the obstacle that a message reports; None if the message is empty."""
    return Obstacle(message=clean_line(message, _MESSAGE_LIMIT), reason=reason) if message else None
