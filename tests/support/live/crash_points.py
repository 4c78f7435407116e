"""Whole runs on a real cluster, in which the operator dies before or after one of its API writes; for the crash points.

`MortalSession` lies between the operator's client and aiohttp and counts its writes; `Kubelet` plays the nodes for pods
that no scheduler takes; `Witness` watches on its own what was ever made.
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
from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import Status
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
FAILING = ("pretrain", 1)
"""The attempt that crashes."""
JOBS = {"curate-1": 1, "pretrain-1": 2, "pretrain-2": 2, "sft-1": 1, "evaluate-1": 1}
"""Every attempt's pods."""
DEFAULTS = Defaults(image="none", backoff_seconds=0.2)
PATIENCE = 170.0
"""Seconds for one run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where an operator dies: around its write of this number, events counted apart."""

    is_event: bool
    number: int
    is_before: bool
    times: int = 1
    """2: the next life dies around its own first write, too."""

    def __str__(self) -> str:
        side = "before" if self.is_before else "after"
        return f"{'event' if self.is_event else 'write'} {self.number}, {side}{', twice' * (self.times - 1)}"


class MortalSession:
    """An aiohttp session in whose hands the process may die."""

    def __init__(self, session: aiohttp.ClientSession, point: Point | None) -> None:
        self._session, self._point = session, point
        self.death = asyncio.Event()
        self.writes: list[str] = []
        self.events: list[str] = []

    def get(self, url: URL, **options: Any) -> Any:
        """A watch."""
        return self._session.get(url, **options)

    @asynccontextmanager
    async def request(self, method: str, url: URL, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        if method == "GET":
            async with self._session.request(method, url, **options) as response:
                yield response
            return
        is_event = url.path.endswith("/events")
        done = self.events if is_event else self.writes
        done.append(describe(method, url, options))
        point = self._point
        is_here = point is not None and (point.is_event, point.number) == (is_event, len(done))
        if point is not None and is_here and point.is_before:
            await self._die()
        async with self._session.request(method, url, **options) as response:
            await response.read()
            if is_here:
                await self._die()
            yield response

    async def close(self) -> None:
        await self._session.close()

    async def _die(self) -> None:
        self.death.set()
        await asyncio.Event().wait()


class MortalClient(Client):
    """The operator's own client on such a session."""

    def __init__(self, credentials: Credentials, point: Point | None) -> None:
        super().__init__(credentials)
        self._point = point
        self.mortal: MortalSession

    async def __aenter__(self) -> MortalClient:
        await super().__aenter__()
        self._session = self.mortal = MortalSession(self._session, self._point)
        return self


@dataclass(kw_only=True)
class Case:
    """One run in a namespace of its own."""

    namespace: str
    point: Point | None = None
    run: Object = field(default_factory=dict)
    """As last seen."""
    made: Counter[str] = field(default_factory=Counter)
    """How many objects of a name were ever made: kind/name, pods by Job and index."""
    uids: set[str] = field(default_factory=set)
    writes: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """What the first life wrote."""
    deaths: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> Status:
        return msgspec.convert(self.run.get("status") or {}, Status)


async def live_through(case: Case, credentials: Credentials) -> None:
    """Serve a run until it has ended, dying where the case says."""
    points = [case.point] * (case.point is not None)
    if case.point is not None and case.point.times == 2:
        points.append(replace(case.point, number=1))
    for point in [*points, None]:
        async with MortalClient(credentials, point) as client:
            process = OperatorProcess(
                client, namespaces=(case.namespace,), defaults=DEFAULTS, backoff_seconds=0.1, backoff_limit_seconds=1.0
            )
            process.start()
            try:
                has_died = await _first(client.mortal.death, case.ended)
            finally:
                process.check()
                await process.kill()
            if not case.deaths:
                case.writes, case.events = client.mortal.writes, client.mortal.events
            case.deaths += has_died
            if not has_died:
                return


async def _first(death: asyncio.Event, ended: asyncio.Event) -> bool:
    """Whether it is death."""
    waits = [asyncio.ensure_future(event.wait()) for event in (death, ended)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if ended.is_set() and not death.is_set():
            await asyncio.sleep(0.5)  # for the last events
        return death.is_set()
    finally:
        for wait in waits:
            wait.cancel()


class Kubelet:
    """Plays the nodes: pods run at once, and end when the operator has seen that they run."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pods: dict[str, dict[str, Object]] = {}
        self._busy: set[str] = set()

    async def see(self, case: Case, type_: str | None, pod: Object | None) -> None:
        """A pod has changed, or (None) the run."""
        pods = self._pods.setdefault(case.namespace, {})
        if pod is not None and type_ == "DELETED":
            pods.pop(pod["metadata"]["uid"], None)
        elif pod is not None:
            pods[pod["metadata"]["uid"]] = pod
        states = {(s.name, s.attempt): s.state for s in case.status.stages}
        for found in list(pods.values()):
            await self._act(found, states.get(attempt_of(found), ""))

    async def _act(self, pod: Object, state: str) -> None:
        uid, phase = pod["metadata"]["uid"], pod["status"]["phase"]
        if "deletionTimestamp" in pod["metadata"] or f"{uid}/{phase}" in self._busy:
            return
        if phase == "Pending":
            self._busy.add(f"{uid}/{phase}")
            await self._patch(pod, "Running", {"running": {}}, is_ready=True)
        elif phase == "Running" and state == "Running":
            self._busy.add(f"{uid}/{phase}")
            end = end_of(pod)
            words = {"terminated": {"exitCode": int(end.exit_code), "message": json.dumps(asdict(end))}}
            await self._patch(pod, "Failed" if end.exit_code else "Succeeded", words, is_ready=False)

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


class Witness:
    """Watches all cases' objects, apart from any operator."""

    def __init__(self, client: Client, cases: Sequence[Case], kubelet: Kubelet) -> None:
        self._client, self._kubelet = client, kubelet
        self._cases = {case.namespace: case for case in cases}

    async def watch(self, resource: resources.Resource, selector: str) -> None:
        """From now on, until cancelled."""
        version = await self._list(resource, selector)
        while True:
            with suppress(ApiError):
                async for type_, raw in self._client.watch(resource, selector=selector, resource_version=version):
                    version = raw["metadata"]["resourceVersion"]
                    if type_ != "BOOKMARK":
                        await self._see(resource, type_, raw)
            await asyncio.sleep(0.1)

    async def _list(self, resource: resources.Resource, selector: str) -> str:
        version = ""
        async for _, version in self._client.list_pages(resource, selector=selector):  # noqa: B007
            pass
        return version

    async def _see(self, resource: resources.Resource, type_: str, raw: Object) -> None:
        case = self._cases.get(raw["metadata"]["namespace"])
        if case is None:
            return
        if resource is resources.RUNS:
            case.run = raw
            if case.status.is_finished:
                case.ended.set()
            await self._kubelet.see(case, None, None)
            return
        if raw["metadata"]["uid"] not in case.uids:
            case.uids.add(raw["metadata"]["uid"])
            case.made[f"{resource.plural}/{name_of(resource, raw)}"] += 1
        if resource is resources.PODS:
            await self._kubelet.see(case, type_, raw)


def end_of(pod: Object) -> Termination:
    """How a worker ends: all well but the failing attempt, whose second rank crashes."""
    if attempt_of(pod) == FAILING:
        code = 1 if index_of(pod) == "1" else int(ExitCode.PEER_LOST)
        return Termination(exit_code=code, rank=1, message="it crashed")
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
    return Termination(exit_code=0, result=result if index_of(pod) == "0" else None)


def attempt_of(pod: Object) -> tuple[str, int]:
    labels = pod["metadata"]["labels"]
    return labels[names.LABEL_STAGE], int(labels[names.LABEL_ATTEMPT])


def index_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"][names.LABEL_COMPLETION_INDEX])


def name_of(resource: resources.Resource, raw: Object) -> str:
    """Of a pod its Job and index: the rest of its name is drawn."""
    if resource is resources.PODS:
        return f"{raw['metadata']['labels'][names.LABEL_JOB_NAME]}-{index_of(raw)}"
    return str(raw["metadata"]["name"])


def expected_children() -> Counter[str]:
    """Each once."""
    jobs = [f"jobs/{RUN}-{attempt}" for attempt in JOBS]
    pods = [f"pods/{RUN}-{attempt}-{index}" for attempt, nodes in JOBS.items() for index in range(nodes)]
    return Counter([*jobs, *pods, f"services/{RUN}", f"persistentvolumeclaims/{names.claim_name(RUN)}"])


_TIMES = {"startTime", "completionTime", "lastTransitionTime", "time", "settledAt", "nextAttemptTime", "goodput"}


def normalise(value: Any) -> Any:
    """A status without times and the ledger."""
    if isinstance(value, Mapping):
        return {key: normalise(inner) for key, inner in value.items() if key not in _TIMES}
    return [normalise(inner) for inner in value] if isinstance(value, list) else value


def find_differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two documents differ, and in what."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [d for key in keys for d in find_differences(found.get(key), wanted.get(key), f"{path}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (one, other) in pairs for d in find_differences(one, other, f"{path}[{i}]")]
    return [] if found == wanted else [f"{path}: {found!r}, not {wanted!r}"]


def describe(method: str, url: URL, options: Mapping[str, Any]) -> str:
    """A write in a few words: what it does to which object, and of a status the stages' states."""
    body = {} if options.get("data") is None else msgspec.json.decode(options["data"])
    parts = url.path.split("/namespaces/")[1].split("/")[1:]
    name = parts[1] if len(parts) > 1 else body.get("metadata", {}).get("name", "")
    if not name:
        name = body.get("reason", "") or url.query.get("labelSelector", "").rpartition("=")[2]
    stages = body.get("status", {}).get("stages", []) if parts[-1] == "status" else []
    states = ", ".join(f"{s['name']} {s['state']} {s['attempt']}" for s in stages if s["state"] not in _QUIET)
    return f"{method} {parts[0]}/{name}{' status ' if parts[-1] == 'status' else ''}{states}"


_QUIET = ("Pending", "Succeeded")
