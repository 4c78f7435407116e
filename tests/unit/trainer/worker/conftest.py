"""Workers whose ranks play a scenario, for every test of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.builders.worker import build_stage
from tests.support.worker_processes import WorkerProcesses


@pytest.fixture
def build_workers(tmp_path: Path) -> Iterator[Callable[..., WorkerProcesses]]:
    """Return a function that builds the workers of an attempt whose ranks play a scenario of `ranks/worker.py`."""

    def build(
        scenario: str, *, environment: dict[str, object] | None = None, start_timeout: int = 0, **fields: object
    ) -> WorkerProcesses:
        return WorkerProcesses(
            folder=tmp_path,
            stage=build_stage(tmp_path, start_timeout_seconds=start_timeout),
            resources=resources,
            environment={"SCENARIO": scenario} | (environment or {}),
            **fields,  # type: ignore[arg-type]  # fields of WorkerProcesses
        )

    with ExitStack() as resources:
        yield build
