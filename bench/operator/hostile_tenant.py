"""A hostile tenant: runs whose workers answer hostilely, forged Jobs and pods, the largest legal runs, and churn.

Used by `tenants.py`. Everything lies in one namespace, whose pods have an address of their own on this machine, where
one server answers on the workers' port.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import zlib
from collections.abc import Sequence
from typing import Any

from bench.operator.control_plane import HOSTILE_ADDRESS, HOSTILE_NAMESPACE, ControlPlane
from bench.operator.scenarios import build_run
from sailvl_operator.api import names
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.errors import ApiError
from sailvl_trainer.contract import METRICS_PORT

NAMESPACE_KIND = Resource(api_version="v1", plural="namespaces")
INT32_MAX = 2**31 - 1
FORGED_PODS = 200
LARGE_RUNS = 50
"""Runs of nearly the size that etcd takes, 1.4 MiB or what the schema allows."""
CHURN_PER_SECOND = 10.0
"""Writes per second that change hostile objects."""
_CONNECTIONS = 32
_REQUIRED = b'"attempt":1,"phase":"running"'
_SLOW_SECONDS = 1.9
"""Delay of slow answers, just below the operator's timeout of a read."""


def build_answers() -> list[tuple[float, bytes]]:
    """Return pairs of a delay in seconds and the bytes of a response, one for each kind of hostile worker."""
    metrics = b",".join(b'"m%04d":%d' % (n, n) for n in range(4000))
    bodies = [
        b"{" + _REQUIRED + b',"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b"{" + _REQUIRED + b',"metrics":{"\xff\xfe":1}}',
        b"{" + _REQUIRED + b',"step":' + b"9" * 400 + b',"steps":-1}',
        b"{" + _REQUIRED + b',"metrics":{' + metrics + b"}}",
        b"{" + _REQUIRED + b',"metrics":{"' + b"n" * 60_000 + b'":1}}',
    ]
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(64)) + bomb.flush()
    answers = [(0.0, _build_response(body)) for body in bodies]
    answers += [(_SLOW_SECONDS, _build_response(b"{" + _REQUIRED + b"}"))] * 3
    answers.append((0.0, _build_response(packed, b"Content-Encoding: gzip\r\n")))
    answers.append((0.0, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"))
    answers.append((0.0, b"\x00\xff\x13garbage\r\n\r\n"))
    return answers


def _build_response(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def build_forged_pod(number: int) -> dict[str, Any]:
    """Build a pod with the labels of a run's first worker, which no Job of the run has created."""
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_RUN: f"large-{number % LARGE_RUNS:03}",
        names.LABEL_STAGE: f"s{number:04}",
        names.LABEL_ATTEMPT: "1",
        names.LABEL_COMPLETION_INDEX: "0",
    }
    container = {"name": names.CONTAINER, "image": "registry.example.com/hostile"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"forged-{number:04}", "labels": labels},
        "spec": {"nodeName": f"node-{number % 20}", "containers": [container], "automountServiceAccountToken": False},
    }


def build_large_run(number: int) -> dict[str, Any]:
    """Build a run of about a megabyte: long environments, paths and annotations."""
    environment = [{"name": f"V{n:03}" + "N" * 50, "value": "v" * 1000} for n in range(64)]
    training = {"data": [{"path": "/data/" + "x" * 500}], "epochs": "1"}
    stages = [
        {"name": f"s{n:02}", "sft": training, "workers": {"nodes": 1, "gpusPerNode": 0, "env": environment}}
        for n in range(12)
    ]
    spec = {
        "image": "registry.example.com/hostile",
        "storage": {"volumeClaim": "none"},
        "model": {"preset": "tiny"},
        "stages": stages,
    }
    metadata = {"name": f"large-{number:03}", "annotations": {"filler": "f" * 200_000}}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": spec}


def build_forged_job(number: int, owner: dict[str, Any]) -> dict[str, Any]:
    """Build a Job that claims to be the run's, with more completions than any list of indexes has room for."""
    run = owner["metadata"]["name"]
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_RUN: run,
        names.LABEL_STAGE: "s00",
        names.LABEL_ATTEMPT: "1",
    }
    reference = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": run, "uid": owner["metadata"]["uid"]}
    container = {"name": names.CONTAINER, "image": "registry.example.com/hostile"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"forged-{number:03}",
            "labels": labels,
            "ownerReferences": [reference | {"controller": True}],
        },
        "spec": {
            "completions": INT32_MAX,
            "parallelism": 0,
            "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
        },
    }


class HostileTenant:
    """Async context manager: creates the hostile objects, and keeps changing them while its context is open."""

    def __init__(self, plane: ControlPlane, runs: int) -> None:
        self._plane, self._runs = plane, runs
        self._answers = itertools.cycle(build_answers())
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server
        self.refusals: list[str] = []
        """Objects that the API server refused, each with its error."""
        self.bytes_written = 0
        """Size of the large runs that the API server accepted."""

    async def __aenter__(self) -> HostileTenant:
        _set_address("replace")
        self._server = await asyncio.start_server(self._answer, HOSTILE_ADDRESS, METRICS_PORT, backlog=4096)
        await self._plane.client.create(NAMESPACE_KIND, "", {"metadata": {"name": HOSTILE_NAMESPACE}})
        runs = await self._create_all(resources.RUNS, [build_large_run(n) for n in range(LARGE_RUNS)])
        await self._create_all(resources.JOBS, [build_forged_job(n, run) for n, run in enumerate(runs)])
        await self._create_all(resources.PODS, [build_forged_pod(n) for n in range(FORGED_PODS)])
        await self._create_all(resources.RUNS, [build_run(f"hostile-{n:04}", 2) for n in range(self._runs)])
        self._tasks.append(asyncio.create_task(self._churn()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        _set_address("delete")

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delay, response = next(self._answers)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay)
            writer.write(response)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _create_all(self, resource: Resource, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Create objects, and return those that the API server accepted."""
        slots = asyncio.Semaphore(_CONNECTIONS)

        async def create(body: dict[str, Any]) -> dict[str, Any] | None:
            async with slots:
                try:
                    return await self._plane.client.create(resource, HOSTILE_NAMESPACE, body)
                except ApiError as error:
                    self.refusals.append(f"{resource.plural}: {error}"[:200])
                    return None

        return [created for created in await asyncio.gather(*map(create, bodies)) if created is not None]

    async def _churn(self) -> None:
        """Change hostile pods and runs, one at a time, at a fixed rate."""
        chance = random.Random(0)
        for number in itertools.count():
            await asyncio.sleep(1 / CHURN_PER_SECOND)
            metadata = {"annotations": {"churn": str(number)}}
            resource, name = (
                (resources.RUNS, f"large-{chance.randrange(LARGE_RUNS):03}")
                if number % 2
                else (resources.PODS, f"forged-{chance.randrange(FORGED_PODS):04}")
            )
            try:
                await self._plane.client.patch(resource, HOSTILE_NAMESPACE, name, {"metadata": metadata})
            except ApiError as error:
                self.refusals.append(f"churn: {error}"[:200])


def _set_address(verb: str) -> None:
    subprocess.run(["ip", "address", verb, f"{HOSTILE_ADDRESS}/32", "dev", "lo"], capture_output=True, check=False)
