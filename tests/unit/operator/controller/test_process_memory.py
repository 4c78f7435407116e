"""Memory of the whole operator process while runs carry as much metadata as the API server stores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sailvl_operator.api import names
from tests.support.apiserver.http import FakeApiServer, serve
from tests.support.builders.operator import build_document

MIB = 1 << 20
LABELS = b'"labels":{"wide":""}'
"""The labels that stand for `WIDE` in the store of the API server."""
WIDE = json.dumps(
    {
        "labels": {f"a{n:05x}": "" for n in range(48_000)},
        "managedFields": [
            {"manager": "kubectl", "fieldsV1": {"f:metadata": {"f:labels": {f"f:a{n:05x}": {} for n in range(48_000)}}}}
        ],
    },
    separators=(",", ":"),
)[1:-1].encode()
"""Metadata with 1.3 MiB, which takes 17 MiB as dicts."""
RUNS = 50


def build_wide_run(number: int, generation: int) -> dict[str, Any]:
    metadata = {"name": f"wide-{number}", "generation": generation, "labels": {"wide": ""}}
    return build_document(seed=generation) | {"metadata": metadata}


@asynccontextmanager
async def run_operator(url: str, folder: Path) -> AsyncIterator[Process]:
    """Run `sailvl operator` in a process of its own."""
    config = folder / "kubeconfig"
    config.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    flags = {"kubeconfig": config, "metrics-host": "127.0.0.1", "metrics-port": 0, "watch-audit-interval-seconds": 0.5}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "sailvl_operator.cli.main", "operator", *arguments),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def read_mib(process: Process, name: str) -> float:
    """Return a size from the status of the process in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


async def until(condition: Any, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_runs_with_the_widest_metadata_fit_into_the_memory_of_the_operator(tmp_path: Path) -> None:
    """They are listed and audited, patched and watched, by an operator that leads."""
    api = FakeApiServer(clock=time.time)
    api.transform_content = lambda content: content.replace(LABELS, WIDE)
    for number in range(RUNS):
        api.put("sailvlruns", build_wide_run(number, 1))

    def count_lists() -> int:
        path = f"/apis/{names.API_VERSION}/{names.PLURAL}"
        return sum(
            r.method == "GET" and r.path == path and "watch" not in r.query and "continue" not in r.query
            for r in api.requests
        )

    async with serve(api) as url, run_operator(url, tmp_path) as process:
        await until(lambda: len(api.list_names("jobs")) == RUNS and count_lists() >= 4, 60)
        for number in range(RUNS):
            api.put("sailvlruns", build_wide_run(number, 2))
        since = count_lists()
        await until(lambda: count_lists() >= since + 2, 60)
        assert process.returncode is None, (tmp_path / "log").read_text()
        assert read_mib(process, "VmHWM") < 256
