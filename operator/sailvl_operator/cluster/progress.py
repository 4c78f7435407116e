"""Reads /progress from the first worker of every running attempt, every few seconds.

Reads are best effort and separate from reconciles, with limits on rate, time and concurrency. A failed read is only
counted, but an attempt that has never answered is reported with the error, since its progress is unknown.

The answers are untrusted. Any container image may serve them, slowly or never; namespaces share reads and writes
fairly, one holds only a part of the concurrent reads, and no round waits for the reads of the last one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from operator import itemgetter
from typing import Any, TypeVar

import aiohttp

from sailvl_operator.api.untrusted import DocumentError, clean_line
from sailvl_operator.cluster.background import CountError, contain_errors, ignore_count
from sailvl_operator.cluster.fair_queue import FairQueue, divide_fairly
from sailvl_operator.cluster.fair_tasks import FairTasks
from sailvl_operator.cluster.metric_names import MetricNames
from sailvl_operator.cluster.readable_pods import is_readable, is_worker_address
from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.observe import AttemptKey, PodRecord
from sailvl_operator.core.reports import MAX_PROGRESS_BYTES, decode_progress
from sailvl_operator.errors import Unreachable
from sailvl_trainer.contract import METRICS_PORT, Progress

T = TypeVar("T")
_Read = tuple[aiohttp.ClientSession, PodRecord]

log = logging.getLogger(__name__)

PROGRESS_WRITES_PER_SECOND = 10.0
"""Maximum rate of status writes for progress alone, over all runs, shared fairly by namespaces. Progress is not read
more often than it is written: with many runs, each is read less often."""
TIMEOUT_SECONDS = 2.0
"""Timeout of one read."""
_CONCURRENCY = 32
"""Maximum number of concurrent reads."""
_NAMESPACE_CONCURRENCY = 8
"""Maximum number of concurrent reads of one namespace."""
_BACKOFF_LIMIT_SECONDS = 60.0
"""Maximum wait before a worker that doesn't answer is read again."""
_BACKPRESSURE_DIVISOR = 4
"""The rate of reads of the namespaces with backpressure is divided by this, since their status writes would be deferred
anyway."""
_UNREACHABLE_SECONDS = 300.0
"""Failed reads are reported after this time: a worker imports its libraries and waits for storage before it answers."""
_ERROR_LENGTH = 200


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
    `has_backpressure`: whether the writes of a namespace should wait.
    `port`: port of the workers. `may_read`: whether a worker may have an address. `count_error`: called for each
    unexpected error. `count_omitted`: called with the number of metrics that an answer had in excess.
    """

    def __init__(
        self,
        *,
        interval_seconds: float,
        pods: Callable[[], Iterable[PodRecord]],
        on_change: Callable[[RunKey], None],
        count: Callable[[str], None],
        has_backpressure: Callable[[str], bool] = lambda _: False,
        timeout_seconds: float = TIMEOUT_SECONDS,
        port: int = METRICS_PORT,
        monotonic: Callable[[], float] = time.monotonic,
        may_read: Callable[[str], bool] = is_worker_address,
        count_error: CountError = ignore_count,
        count_omitted: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._interval_seconds = interval_seconds
        self._pods = pods
        self._on_change = on_change
        self._count = count
        self._has_backpressure = has_backpressure
        self._timeout_seconds = timeout_seconds
        self._port = port
        self._monotonic = monotonic
        self._may_read = may_read
        self._count_error = count_error
        self._documents: dict[RunKey, dict[AttemptKey, tuple[str, Progress]]] = {}  # with the run's UID
        self._errors: dict[RunKey, dict[AttemptKey, tuple[str, str]]] = {}  # with the run's UID
        self._metric_names = MetricNames(count_omitted)
        self._schedules: dict[str, _Schedule] = {}  # by the pod's UID
        self._reads: FairTasks[tuple[str, str], _Read] = FairTasks(
            "progress",
            self._read,
            group_by=itemgetter(0),
            limit=_CONCURRENCY,
            group_limit=_NAMESPACE_CONCURRENCY,
            count_error=count_error,
        )  # by namespace and the pod's UID
        self._write_intervals: dict[str, float] = {}  # by namespace

    def get(self, key: RunKey, uid: str) -> Mapping[AttemptKey, Progress]:
        """Return the newest progress of each attempt of a run. `uid`: UID of the run, since an earlier run may have had
        the same name."""
        return _select_run(self._documents.get(key, {}), uid)

    def get_errors(self, key: RunKey, uid: str) -> Mapping[AttemptKey, str]:
        """Return the attempts of a run that have never answered, each with the error."""
        return _select_run(self._errors.get(key, {}), uid)

    def write_interval_seconds(self, namespace: str) -> float:
        """Return the seconds between two writes of a run's progress with which its namespace keeps to its share of
        PROGRESS_WRITES_PER_SECOND."""
        return self._write_intervals.get(namespace, 0.0)

    def forget(self, key: RunKey, is_closed: Callable[[str, int], bool]) -> None:
        """Remove progress and errors of closed attempts."""
        self._metric_names.forget(key, is_closed)
        _drop_closed(self._documents, key, is_closed)
        _drop_closed(self._errors, key, is_closed)

    async def run(self) -> None:
        """Read in rounds until cancelled."""
        if not self._interval_seconds:
            return
        async with self.build_session() as session, asyncio.TaskGroup() as group:
            group.create_task(self._reads.run())
            while True:
                await asyncio.sleep(self._interval_seconds)
                with contain_errors("progress", self._count_error, subject="a round of reads"):
                    self._add_due(session)

    def build_session(self) -> aiohttp.ClientSession:
        """Build the HTTP session for reads; it keeps no cookies, decompresses nothing and opens a connection a read."""
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
            connector=aiohttp.TCPConnector(limit=_CONCURRENCY, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )

    async def read_due(self, session: aiohttp.ClientSession) -> None:
        """Read one round, and wait for its end."""
        self._add_due(session)
        await self._reads.drain()

    def _add_due(self, session: aiohttp.ClientSession) -> None:
        """Add one round of reads: the running attempts that are due, of each namespace in turn, those that have waited
        longest first, up to the rate."""
        pods = {pod.uid: pod for pod in self._pods() if is_readable(pod) and self._may_read(pod.ip)}
        now = self._monotonic()
        self._schedules = {uid: self._schedules.get(uid, _Schedule()) for uid in pods}
        self._update_write_intervals()
        due = ((schedule.at, uid) for uid, schedule in self._schedules.items() if schedule.at <= now)
        queue: FairQueue[str, PodRecord] = FairQueue(lambda uid: pods[uid].namespace)
        for _, uid in sorted(due):
            if (pods[uid].namespace, uid) not in self._reads:
                queue.add(uid, pods[uid])
        for pod in self._choose_round(queue):
            self._reads.add((pod.namespace, pod.uid), (session, pod))

    def _choose_round(self, queue: FairQueue[str, PodRecord]) -> Iterator[PodRecord]:
        """Yield the pods to read in this round. At most one round of reads of a namespace waits."""
        limit = max(1, round(PROGRESS_WRITES_PER_SECOND * self._interval_seconds))
        loaded_limit = max(1, limit // _BACKPRESSURE_DIVISOR)
        loaded = 0

        def may_read(namespace: str) -> bool:
            is_loaded = loaded >= loaded_limit and self._has_backpressure(namespace)
            return not is_loaded and self._reads.count_group((namespace, "")) < limit + _NAMESPACE_CONCURRENCY

        for _ in range(limit):
            found = queue.pop_where(may_read)
            if found is None:
                return
            pod = found[1]
            loaded += self._has_backpressure(pod.namespace)
            yield pod

    def _update_write_intervals(self) -> None:
        runs = Counter(namespace for namespace, _ in self._documents)
        demands = {namespace: count / self._interval_seconds for namespace, count in runs.items()}
        shares = divide_fairly(demands, PROGRESS_WRITES_PER_SECOND)
        self._write_intervals = {namespace: runs[namespace] / share for namespace, share in shares.items()}

    async def _read(self, _: tuple[str, str], read: _Read) -> None:
        session, pod = read
        document, error = None, ""
        try:
            document = await self._fetch(session, pod.ip)
        except (aiohttp.ClientError, TimeoutError, DocumentError, Unreachable) as failure:
            error = clean_line(str(failure), _ERROR_LENGTH) or "no answer in time"
        except Exception as failure:
            self._count_error("progress")
            log.exception("internal error, skipping pod %s/%s", pod.namespace, pod.name)
            error = type(failure).__name__
        if pod.uid not in self._schedules:
            return  # the pod has ended meanwhile
        if document is None:
            self._count("failed")
            self._back_off(pod, error)
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
                if len(body) > MAX_PROGRESS_BYTES:
                    raise Unreachable(f"/progress returned more than {MAX_PROGRESS_BYTES} bytes")
            return decode_progress(body)

    def _store(self, pod: PodRecord, document: Progress) -> None:
        key, attempt = (pod.namespace, pod.run), (pod.stage, pod.attempt)
        if document.attempt != pod.attempt:
            return  # the pod's address already belongs to a worker of another attempt
        document = self._metric_names.restrict(pod, document)
        documents = self._documents.setdefault(key, {})
        before = documents.get(attempt)
        self._errors.get(key, {}).pop(attempt, None)
        documents[attempt] = pod.run_uid, document
        if before is None or before[0] != pod.run_uid or _drop_times(before[1]) != _drop_times(document):
            self._on_change(key)


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
