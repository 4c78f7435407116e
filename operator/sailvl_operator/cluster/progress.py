"""Reads /progress from the first worker of every running attempt, every few seconds.

Reads are best effort and separate from reconciles, with limits on rate, time and concurrency. A failed read is only
counted, but an attempt that has never answered is reported with the error, since its progress is unknown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypeVar

import aiohttp
import msgspec

from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.observe import AttemptKey, PodRecord
from sailvl_operator.errors import Unreachable
from sailvl_trainer.contract import METRICS_PORT, Progress

T = TypeVar("T")

PROGRESS_WRITES_PER_SECOND = 10.0
"""Maximum rate of status writes for progress alone, over all runs. Progress is not read more often than it is written:
with many runs, each is read less often."""
TIMEOUT_SECONDS = 2.0
"""Timeout of one read."""
_CONCURRENCY = 32
"""Maximum number of concurrent reads."""
_BACKOFF_LIMIT_SECONDS = 60.0
"""Maximum wait before a worker that doesn't answer is read again."""
_BACKPRESSURE_DIVISOR = 4
"""Under backpressure the rate of reads is divided by this, since the status write would be deferred anyway."""
_UNREACHABLE_SECONDS = 300.0
"""Failed reads are reported after this time: a worker imports its libraries and waits for storage before it answers."""
_SIZE_LIMIT = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class _Schedule:
    """Time of the next read of a pod, in monotonic seconds, and its failures in a row."""

    at: float = 0.0
    failures: int = 0
    failing_since: float = inf


class ProgressReader:
    """Newest progress by run and attempt.

    `interval_seconds`: time between rounds of reads; 0 disables them. `pods`: returns all known pods. `on_change`:
    called with the run's key when its progress changes. `count`: called with the outcome of each read (ok, failed).
    `port`: port of the workers.
    """

    def __init__(
        self,
        *,
        interval_seconds: float,
        pods: Callable[[], Iterable[PodRecord]],
        on_change: Callable[[RunKey], None],
        count: Callable[[str], None],
        has_backpressure: Callable[[], bool] = lambda: False,
        timeout_seconds: float = TIMEOUT_SECONDS,
        port: int = METRICS_PORT,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_seconds = interval_seconds
        self._pods = pods
        self._on_change = on_change
        self._count = count
        self._has_backpressure = has_backpressure
        self._timeout_seconds = timeout_seconds
        self._port = port
        self._monotonic = monotonic
        self._documents: dict[RunKey, dict[AttemptKey, tuple[str, Progress]]] = {}  # with the run's UID
        self._errors: dict[RunKey, dict[AttemptKey, tuple[str, str]]] = {}  # with the run's UID
        self._schedules: dict[str, _Schedule] = {}  # by the pod's UID

    def get(self, key: RunKey, uid: str) -> Mapping[AttemptKey, Progress]:
        """Return the newest progress of each attempt of a run. `uid`: UID of the run, since an earlier run may have had
        the same name."""
        return _select_run(self._documents.get(key, {}), uid)

    def get_errors(self, key: RunKey, uid: str) -> Mapping[AttemptKey, str]:
        """Return the attempts of a run that have never answered, each with the error."""
        return _select_run(self._errors.get(key, {}), uid)

    def __len__(self) -> int:
        """Return the number of runs whose progress is known."""
        return len(self._documents)

    def forget(self, key: RunKey, is_closed: Callable[[str, int], bool]) -> None:
        """Remove progress and errors of closed attempts."""
        _drop_closed(self._documents, key, is_closed)
        _drop_closed(self._errors, key, is_closed)

    async def run(self) -> None:
        """Read in rounds until cancelled."""
        if not self._interval_seconds:
            return
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds)
        connector = aiohttp.TCPConnector(limit=_CONCURRENCY, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                await asyncio.sleep(self._interval_seconds)
                await self.read_due(session)

    async def read_due(self, session: aiohttp.ClientSession) -> None:
        """Read one round: the running attempts that are due, those that have waited longest first, up to the rate."""
        pods = {pod.uid: pod for pod in self._pods() if is_readable(pod)}
        now = self._monotonic()
        self._schedules = {uid: self._schedules.get(uid, _Schedule()) for uid in pods}
        due = sorted((schedule.at, uid) for uid, schedule in self._schedules.items() if schedule.at <= now)
        rate = PROGRESS_WRITES_PER_SECOND / (_BACKPRESSURE_DIVISOR if self._has_backpressure() else 1)
        selected = due[: max(1, round(rate * self._interval_seconds))]
        await asyncio.gather(*(self._read(session, pods[uid]) for _, uid in selected))

    async def _read(self, session: aiohttp.ClientSession, pod: PodRecord) -> None:
        try:
            document = await self._fetch(session, pod.ip)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, Unreachable) as error:
            self._count("failed")
            self._back_off(pod, str(error) or "no answer in time")
            return
        self._count("ok")
        self._schedules[pod.uid] = _Schedule(at=self._monotonic())
        self._store(pod, document)

    def _back_off(self, pod: PodRecord, error: str) -> None:
        """Schedule the next read of a pod with exponential backoff, and report the error if it persists."""
        schedule, now = self._schedules[pod.uid], self._monotonic()
        failures, since = schedule.failures + 1, min(schedule.failing_since, now)
        backoff = min(self._interval_seconds * 2.0 ** min(failures, 30), _BACKOFF_LIMIT_SECONDS)
        self._schedules[pod.uid] = _Schedule(failures=failures, failing_since=since, at=now + backoff)
        if now - since >= _UNREACHABLE_SECONDS:
            self._report_error(pod, f"port {self._port} of pod {pod.name}: {error}")

    def _report_error(self, pod: PodRecord, error: str) -> None:
        """Store the error, unless the attempt has answered before or its error is already stored."""
        key, attempt = (pod.namespace, pod.run), (pod.stage, pod.attempt)
        errors = self._errors.setdefault(key, {})
        if attempt not in self._documents.get(key, {}) and attempt not in errors:
            errors[attempt] = pod.run_uid, error
            self._on_change(key)

    async def _fetch(self, session: aiohttp.ClientSession, ip: str) -> Progress:
        host = f"[{ip}]" if ":" in ip else ip
        async with session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as response:
            if response.status != 200:
                raise Unreachable(f"/progress returned {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _SIZE_LIMIT:
                    raise Unreachable(f"/progress returned more than {_SIZE_LIMIT} bytes")
            return msgspec.json.decode(body, type=Progress)

    def _store(self, pod: PodRecord, document: Progress) -> None:
        key, attempt = (pod.namespace, pod.run), (pod.stage, pod.attempt)
        if document.attempt != pod.attempt:
            return  # the pod's address already belongs to a worker of another attempt
        documents = self._documents.setdefault(key, {})
        before = documents.get(attempt)
        self._errors.get(key, {}).pop(attempt, None)
        documents[attempt] = pod.run_uid, document
        if before is None or before[0] != pod.run_uid or _drop_times(before[1]) != _drop_times(document):
            self._on_change(key)


def is_readable(pod: PodRecord) -> bool:
    """Whether a pod is the first worker of an attempt and runs."""
    is_running = pod.phase == "Running" and not (pod.is_gone or pod.is_deleting)
    return is_running and pod.index == 0 and bool(pod.ip)


def _select_run(entries: Mapping[AttemptKey, tuple[str, T]], uid: str) -> Mapping[AttemptKey, T]:
    """Select the entries of the run with this UID, or with an unknown UID."""
    return {attempt: value for attempt, (run_uid, value) in entries.items() if run_uid in ("", uid)}


def _drop_closed(
    entries: dict[RunKey, dict[AttemptKey, Any]], key: RunKey, is_closed: Callable[[str, int], bool]
) -> None:
    remaining = {attempt: value for attempt, value in entries.pop(key, {}).items() if not is_closed(*attempt)}
    if remaining:
        entries[key] = remaining


def _drop_times(document: Progress) -> Progress:
    """Copy a document without the fields that change although nothing has happened."""
    return replace(document, time=0.0, seconds={})
