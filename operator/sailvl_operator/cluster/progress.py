"""Reads /progress from the first worker of every running attempt, every few seconds; the engine looks at the newest.

Best effort: bounded in number, rate and time, apart from the reconciles. A read that fails means nothing but a count;
an attempt that has never answered is told of, since nobody would see how far it is.
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
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.errors import Unreachable
from sailvl_operator.settings import ProgressSettings
from sailvl_trainer.contract import METRICS_PORT, Progress

T = TypeVar("T")
Attempt = tuple[str, int]
"""stage, attempt"""

_SIZE_LIMIT = 65536
_RUSH_DIVISOR = 4
"""In a rush so much less is read: what it says would wait to be written anyway."""
_SILENT_SECONDS = 300.0
"""For which a worker may load its programs, and wait for the storage, before it answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """When an attempt is read next."""

    at: float = 0.0
    failures: int = 0
    """In a row."""
    since: float = inf
    """The first of them."""


class ProgressReader:
    """Documents by run, stage and attempt."""

    def __init__(
        self,
        settings: ProgressSettings,
        *,
        pods: Callable[[], Iterable[PodRecord]],
        on_change: Callable[[RunKey], None],
        count: Callable[[str], None],
        has_backpressure: Callable[[], bool] = lambda: False,
        port: int = METRICS_PORT,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._pods = pods
        self._on_change = on_change
        self._count = count
        self._has_backpressure = has_backpressure
        self._port = port
        self._monotonic = monotonic
        self._documents: dict[RunKey, dict[Attempt, tuple[str, Progress]]] = {}  # with the run's uid
        self._errors: dict[RunKey, dict[Attempt, tuple[str, str]]] = {}  # why not, with the run's uid
        self._turns: dict[str, _Turn] = {}  # by the pod's uid

    def get(self, key: RunKey, uid: str) -> Mapping[Attempt, Progress]:
        """The newest document of each attempt of a run, and of none that had its name before."""
        return _of_run(self._documents.get(key, {}), uid)

    def get_errors(self, key: RunKey, uid: str) -> Mapping[Attempt, str]:
        """Attempts of a run that have never answered, with the reason."""
        return _of_run(self._errors.get(key, {}), uid)

    def __len__(self) -> int:
        """Runs whose workers were heard of."""
        return len(self._documents)

    def forget(self, key: RunKey, is_closed: Callable[[str, int], bool]) -> None:
        """Drop what is known of closed attempts."""
        _drop_closed(self._documents, key, is_closed)
        _drop_closed(self._errors, key, is_closed)

    async def run(self) -> None:
        """Rounds, until cancelled."""
        if not self._settings.interval:
            return
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout)
        connector = aiohttp.TCPConnector(limit=self._settings.concurrency, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                await asyncio.sleep(self._settings.interval)
                await self.read_due(session)

    async def read_due(self, session: aiohttp.ClientSession) -> None:
        """One round: the running attempts whose turn it is, those first that waited longest for it."""
        pods = {pod.uid: pod for pod in self._pods() if is_readable(pod)}
        now = self._monotonic()
        self._turns = {uid: self._turns.get(uid, _Turn()) for uid in pods}
        due = sorted((turn.at, uid) for uid, turn in self._turns.items() if turn.at <= now)
        rate = self._settings.rate / (_RUSH_DIVISOR if self._has_backpressure() else 1)
        few = due[: max(1, round(rate * self._settings.interval))]
        await asyncio.gather(*(self._read(session, pods[uid]) for _, uid in few))

    async def _read(self, session: aiohttp.ClientSession, pod: PodRecord) -> None:
        try:
            document = await self._fetch(session, pod.ip)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, Unreachable) as error:
            self._count("failed")
            self._put_off(pod, str(error) or "no answer in time")
            return
        self._count("ok")
        self._turns[pod.uid] = _Turn(at=self._monotonic())
        self._store(pod, document)

    def _put_off(self, pod: PodRecord, why: str) -> None:
        """Who doesn't answer is asked less often each time."""
        turn, now = self._turns[pod.uid], self._monotonic()
        failures, since = turn.failures + 1, min(turn.since, now)
        wait = min(self._settings.interval * 2.0 ** min(failures, 30), self._settings.patience)
        self._turns[pod.uid] = _Turn(failures=failures, since=since, at=now + wait)
        if now - since >= _SILENT_SECONDS:
            self._note_silence(pod, f"port {self._port} of pod {pod.name}: {why}")

    def _note_silence(self, pod: PodRecord, why: str) -> None:
        key, attempt = (pod.namespace, pod.run), (pod.stage, pod.attempt)
        unheard = self._errors.setdefault(key, {})
        if attempt not in self._documents.get(key, {}) and attempt not in unheard:
            unheard[attempt] = pod.run_uid, why
            self._on_change(key)

    async def _fetch(self, session: aiohttp.ClientSession, ip: str) -> Progress:
        host = f"[{ip}]" if ":" in ip else ip
        async with session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as response:
            if response.status != 200:
                raise Unreachable(f"/progress answers {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _SIZE_LIMIT:
                    raise Unreachable(f"/progress answers more than {_SIZE_LIMIT} bytes")
            return msgspec.json.decode(body, type=Progress)

    def _store(self, pod: PodRecord, document: Progress) -> None:
        key, attempt = (pod.namespace, pod.run), (pod.stage, pod.attempt)
        if document.attempt != pod.attempt:
            return  # the pod's address belongs to another worker by now
        documents = self._documents.setdefault(key, {})
        before = documents.get(attempt)
        self._errors.get(key, {}).pop(attempt, None)
        documents[attempt] = pod.run_uid, document
        if before is None or before[0] != pod.run_uid or _essence(before[1]) != _essence(document):
            self._on_change(key)


def is_readable(pod: PodRecord) -> bool:
    """The first worker of an attempt, while it runs."""
    is_there = pod.phase == "Running" and not (pod.is_gone or pod.is_deleting)
    return is_there and pod.index == 0 and bool(pod.ip)


def _of_run(known: Mapping[Attempt, tuple[str, T]], uid: str) -> Mapping[Attempt, T]:
    """Without what is of a run that had the name before."""
    return {attempt: found for attempt, (of, found) in known.items() if of in ("", uid)}


def _drop_closed(known: dict[RunKey, dict[Attempt, Any]], key: RunKey, is_closed: Callable[[str, int], bool]) -> None:
    kept = {attempt: found for attempt, found in known.pop(key, {}).items() if not is_closed(*attempt)}
    if kept:
        known[key] = kept


def _essence(document: Progress) -> Progress:
    """Without what changes though nothing has happened."""
    return replace(document, time=0.0, seconds={})
