"""Whole runs on a real control plane, in which the operator process ends before or after one of its API writes.

`CrashingSession` wraps the operator's aiohttp session and counts its writes; `SimulatedKubelet` runs pods that no
scheduler takes; `ObjectRecorder` watches independently which objects were ever created.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from sailvl_operator.api import names
from sailvl_operator.api.status import Status
from sailvl_operator.api.types import Defaults
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.credentials import Credentials
from sailvl_operator.errors import ApiError, Conflict, NotFound
from sailvl_trainer.contract import ExitCode, Result, Stage, Termination
from tests.support.operator_process import OperatorProcess

Object = dict[str, Any]

RUN = "whole"
SPEC: Object = {
    "image": "registry.example.com/sailvl-trainer:none",
    "storage": {"volumeClaimTemplate": {"storageClassName": "none", "resources": {"requests": {"storage": "1Gi"}}}},
    "model": {"preset": "tiny"},
    "workers": {"nodes": 1, "gpusPerNode": 0, "schedulerName": "nobody"},
    "stages": [
        {"name": "curate", "curate": {"sources": [{"format": "procedural", "samples": 8}]}},
        {
            "name": "pretrain",
            "workers": {"nodes": 2},
            "pretrain": {"train": ["connector"], "data": [{"from": "curate"}], "tokens": "32K"},
        },
        {"name": "sft", "sft": {"data": [{"from": "curate"}], "epochs": "1"}},
        {
            "name": "evaluate",
            "evaluate": {"custom": [{"name": "colours", "path": "/data/colours.tsv", "metric": "exact_match"}]},
        },
    ],
}
CRASHING_ATTEMPT = ("pretrain", 1)
"""Stage and attempt that crash."""
JOBS = {"curate-1": 1, "pretrain-1": 2, "pretrain-2": 2, "sft-1": 1, "evaluate-1": 1}
"""Number of pods of each attempt."""
DEFAULTS = Defaults(image="none", backoff_seconds=0.2)
RUN_TIMEOUT_SECONDS = 170.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CrashPoint:
    """The write around which an operator process ends."""

    is_event: bool
    """Whether the number counts events; they are counted separately."""
    number: int
    is_before: bool
    times: int = 1
    """With 2, the next process ends around its own first write, too."""

    def __str__(self) -> str:
        side = "before" if self.is_before else "after"
        return f"{'event' if self.is_event else 'write'} {self.number}, {side}{', twice' * (self.times - 1)}"


class CrashingSession:
    """An aiohttp session that stops forever at the crash point."""

    def __init__(self, session: aiohttp.ClientSession, point: CrashPoint | None) -> None:
        self._session, self._point = session, point
        self.has_crashed = asyncio.Event()
        self.writes: list[str] = []
        self.events: list[str] = []

    def get(self, url: URL, **options: Any) -> Any:
        """Open a watch."""
        return self._session.get(url, **options)

    @asynccontextmanager
    async def request(self, method: str, url: URL, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and record it if it is a write."""
        if method == "GET":
            async with self._session.request(method, url, **options) as response:
                yield response
            return
        is_event = url.path.endswith("/events")
        done = self.events if is_event else self.writes
        done.append(describe_write(method, url, options))
        point = self._point
        is_here = point is not None and (point.is_event, point.number) == (is_event, len(done))
        if point is not None and is_here and point.is_before:
            await self._crash()
        async with self._session.request(method, url, **options) as response:
            await response.read()
            if is_here:
                await self._crash()
            yield response

    async def close(self) -> None:
        """Close the wrapped session."""
        await self._session.close()

    async def _crash(self) -> None:
        self.has_crashed.set()
        await asyncio.Event().wait()


class CrashingClient(Client):
    """The operator's own client over a CrashingSession."""

    def __init__(self, credentials: Credentials, point: CrashPoint | None) -> None:
        super().__init__(credentials)
        self._point = point
        self.crashing_session: CrashingSession

    async def __aenter__(self) -> CrashingClient:
        await super().__aenter__()
        self._session = self.crashing_session = CrashingSession(self._session, self._point)
        return self


@dataclass(kw_only=True)
class CrashCase:
    """One run in a namespace of its own."""

    namespace: str
    point: CrashPoint | None = None
    run: Object = field(default_factory=dict)
    """The newest state of the run."""
    created: Counter[str] = field(default_factory=Counter)
    """Number of objects ever created, by kind and name; pods by Job and index."""
    uids: set[str] = field(default_factory=set)
    writes: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Writes and events of the first operator process."""
    crashes: int = 0
    has_finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> Status:
        """The run's status."""
        return msgspec.convert(self.run.get("status") or {}, Status)


async def reconcile_with_crashes(case: CrashCase, credentials: Credentials) -> None:
    """Reconcile a run until it has finished; each process but the last ends at its crash point."""
    points = [case.point] * (case.point is not None)
    if case.point is not None and case.point.times == 2:
        points.append(replace(case.point, number=1))
    for point in [*points, None]:
        async with CrashingClient(credentials, point) as client:
            process = OperatorProcess(
                client, namespaces=(case.namespace,), defaults=DEFAULTS, backoff_seconds=0.1, backoff_limit_seconds=1.0
            )
            process.start()
            try:
                has_crashed = await _wait_for_first(client.crashing_session.has_crashed, case.has_finished)
            finally:
                process.check()
                await process.kill()
            if not case.crashes:
                case.writes, case.events = client.crashing_session.writes, client.crashing_session.events
            case.crashes += has_crashed
            if not has_crashed:
                return


async def _wait_for_first(crashed: asyncio.Event, finished: asyncio.Event) -> bool:
    """Return whether the process crashed before the run finished."""
    waits = [asyncio.ensure_future(event.wait()) for event in (crashed, finished)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if finished.is_set() and not crashed.is_set():
            await asyncio.sleep(0.5)  # time for the last events to arrive
        return crashed.is_set()
    finally:
        for wait in waits:
            wait.cancel()


class SimulatedKubelet:
    """Runs pods at once and ends them when the status shows that they run."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pods: dict[str, dict[str, Object]] = {}
        self._handled: set[str] = set()

    async def observe(self, case: CrashCase, type_: str | None, pod: Object | None) -> None:
        """Act on a change of a pod, or of the run if `pod` is None."""
        pods = self._pods.setdefault(case.namespace, {})
        if pod is not None and type_ == "DELETED":
            pods.pop(pod["metadata"]["uid"], None)
        elif pod is not None:
            pods[pod["metadata"]["uid"]] = pod
        states = {(s.name, s.attempt): s.state for s in case.status.stages}
        for found in list(pods.values()):
            await self._act(found, states.get(get_attempt(found), ""))

    async def _act(self, pod: Object, state: str) -> None:
        uid, phase = pod["metadata"]["uid"], pod["status"]["phase"]
        if "deletionTimestamp" in pod["metadata"] or f"{uid}/{phase}" in self._handled:
            return
        if phase == "Pending":
            self._handled.add(f"{uid}/{phase}")
            await self._patch(pod, "Running", {"running": {}}, is_ready=True)
        elif phase == "Running" and state == "Running":
            self._handled.add(f"{uid}/{phase}")
            end = build_termination(pod)
            state_update = {"terminated": {"exitCode": int(end.exit_code), "message": json.dumps(asdict(end))}}
            await self._patch(pod, "Failed" if end.exit_code else "Succeeded", state_update, is_ready=False)

    async def _patch(self, pod: Object, phase: str, state: Object, *, is_ready: bool) -> None:
        container = {"name": names.CONTAINER, "image": "none", "imageID": "", "restartCount": 0}
        status = {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "True" if is_ready else "False"}],
            "containerStatuses": [container | {"ready": is_ready, "state": state}],
        }
        metadata = pod["metadata"]
        with suppress(NotFound, Conflict):
            await self._client.patch(
                resources.PODS,
                metadata["namespace"],
                metadata["name"],
                {"metadata": {"uid": metadata["uid"]}, "status": status},
                subresource="status",
            )


class ObjectRecorder:
    """Records the objects of all cases, independently of any operator."""

    def __init__(self, client: Client, cases: Sequence[CrashCase], kubelet: SimulatedKubelet) -> None:
        self._client, self._kubelet = client, kubelet
        self._cases = {case.namespace: case for case in cases}

    async def watch(self, resource: resources.Resource, selector: str) -> None:
        """Record a kind of objects from now on, until cancelled."""
        version = await self._list(resource, selector)
        while True:
            with suppress(ApiError):
                async for type_, raw in self._client.watch(resource, selector=selector, resource_version=version):
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        await self._record(resource, type_, raw)
            await asyncio.sleep(0.1)

    async def _list(self, resource: resources.Resource, selector: str) -> str:
        version = ""
        async for _, version in self._client.list_pages(resource, selector=selector):  # noqa: B007
            pass
        return version

    async def _record(self, resource: resources.Resource, type_: str, raw: Object) -> None:
        case = self._cases.get(raw["metadata"]["namespace"])
        if case is None:
            return
        if resource is resources.RUNS:
            case.run = raw
            if case.status.is_finished:
                case.has_finished.set()
            await self._kubelet.observe(case, None, None)
            return
        if raw["metadata"]["uid"] not in case.uids:
            case.uids.add(raw["metadata"]["uid"])
            case.created[f"{resource.plural}/{get_stable_name(resource, raw)}"] += 1
        if resource is resources.PODS:
            await self._kubelet.observe(case, type_, raw)


def build_termination(pod: Object) -> Termination:
    """Return how a worker ends: successfully, except in the crashing attempt, whose second worker crashes."""
    if get_attempt(pod) == CRASHING_ATTEMPT:
        code = 1 if get_completion_index(pod) == "1" else int(ExitCode.PEER_LOST)
        return Termination(exit_code=code, rank=1, message="crashed")
    document = msgspec.json.decode(pod["metadata"]["annotations"][names.ANNOTATION_STAGE], type=Stage)
    result = Result(
        stage=document.stage,
        kind=document.kind,
        digest=document.digest,
        attempt=document.attempt,
        output=document.output.removeprefix(f"{document.storage}/"),
        steps=10,
        seconds=1.0,
        metrics={"heldOutLoss": 1.5},
    )
    return Termination(exit_code=0, result=result if get_completion_index(pod) == "0" else None)


def get_attempt(pod: Object) -> tuple[str, int]:
    """Return stage and attempt of a pod."""
    labels = pod["metadata"]["labels"]
    return labels[names.LABEL_STAGE], int(labels[names.LABEL_ATTEMPT])


def get_completion_index(pod: Object) -> str:
    """Return the completion index of a pod."""
    return str(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX])


def get_stable_name(resource: resources.Resource, raw: Object) -> str:
    """Return an object's name; a pod's is made of its Job and index, because its own has a random suffix."""
    if resource is resources.PODS:
        return f"{raw['metadata']['labels'][names.LABEL_JOB_NAME]}-{get_completion_index(raw)}"
    return str(raw["metadata"]["name"])


def count_expected_objects() -> Counter[str]:
    """Return the objects of an undisturbed run, each once."""
    jobs = [f"jobs/{RUN}-{attempt}" for attempt in JOBS]
    pods = [f"pods/{RUN}-{attempt}-{index}" for attempt, nodes in JOBS.items() for index in range(nodes)]
    others = [f"services/{RUN}", f"networkpolicies/{RUN}", f"persistentvolumeclaims/{names.claim_name(RUN)}"]
    return Counter([*jobs, *pods, *others])


_TIMES = {"startTime", "completionTime", "lastTransitionTime", "time", "settledAt", "nextAttemptTime", "goodput"}


def strip_times(value: Any) -> Any:
    """Return a status without times and without the goodput ledger."""
    if isinstance(value, Mapping):
        return {key: strip_times(inner) for key, inner in value.items() if key not in _TIMES}
    return [strip_times(inner) for inner in value] if isinstance(value, list) else value


def find_differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Return path and values of each difference between two documents."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [d for key in keys for d in find_differences(found.get(key), wanted.get(key), f"{path}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (one, other) in pairs for d in find_differences(one, other, f"{path}[{i}]")]
    return [] if found == wanted else [f"{path}: {found!r}, not {wanted!r}"]


def describe_write(method: str, url: URL, options: Mapping[str, Any]) -> str:
    """Return method and object of a write; for a status also the states of the active stages."""
    body = {} if options.get("data") is None else msgspec.json.decode(options["data"])
    parts = url.path.split("/namespaces/")[1].split("/")[1:]
    name = parts[1] if len(parts) > 1 else body.get("metadata", {}).get("name", "")
    if not name:
        name = body.get("reason", "") or url.query.get("labelSelector", "").rpartition("=")[2]
    stages = body.get("status", {}).get("stages", []) if parts[-1] == "status" else []
    states = ", ".join(f"{s['name']} {s['state']} {s['attempt']}" for s in stages if s["state"] not in _INACTIVE_STATES)
    return f"{method} {parts[0]}/{name}{' status ' if parts[-1] == 'status' else ''}{states}"


_INACTIVE_STATES = ("Pending", "Succeeded")
