"""Records one run while faults are injected into it: a thread polls status, pods and progress four times a second.

Progress is read from the first worker, because the operator updates the status only every five seconds.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.faults.environment.api import ClusterReader
from tests.faults.environment.host import WorkerContainer, list_workers

POLL_SECONDS = 0.25
PROGRESS_TIMEOUT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressPoint:
    """The progress of the run at one moment."""

    at: float
    """Unix time in seconds."""
    stage: str
    attempt: int
    state: str
    """State of the stage in the run's status."""
    phase: str = ""
    """Phase that the first worker reports; empty, like the fields below, if it does not answer."""
    step: int = 0
    steps: int = 0
    saved: int | None = None
    """Step of the newest checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observations:
    """All observations of a run, in order of time and without repetitions."""

    points: list[ProgressPoint] = field(default_factory=list)
    statuses: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    printed_rows: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    """Rows of `kubectl get svr` without their age."""


class RunRecorder:
    """Records one run from `start` to `stop`."""

    def __init__(self, api: ClusterReader, run: str) -> None:
        self.observations = Observations()
        self.workers: list[WorkerContainer] = []
        self._api, self._run, self._version = api, run, ""
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._poll_until_stopped, name="recorder", daemon=True)

    def start(self) -> None:
        """Start to poll in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._end.set()
        self._thread.join()

    @property
    def status(self) -> dict[str, Any]:
        """The newest status; empty before the first."""
        return self.observations.statuses[-1][1] if self.observations.statuses else {}

    @property
    def now(self) -> ProgressPoint | None:
        """The newest point."""
        return self.observations.points[-1] if self.observations.points else None

    def get_stage(self, name: str) -> dict[str, Any]:
        """Return a stage's newest status."""
        return next((s for s in self.status.get("stages", []) if s["name"] == name), {})

    def get_true_condition(self, kind: str) -> dict[str, Any]:
        """Return the newest condition of a type if it is true, else an empty one."""
        found = (c for c in self.status.get("conditions", []) if c["type"] == kind and c["status"] == "True")
        return next(found, {})

    def wait_for(self, description: str, condition: Callable[[], Any], seconds: float) -> Any:
        """Wait until a condition returns something true, and return it; fail after some seconds."""
        until = time.monotonic() + seconds
        while not (found := condition()):
            if self._error is not None:
                raise self._error
            assert time.monotonic() < until, f"not within {seconds:.0f} s: {description}; {self.now}; {self.status}"
            time.sleep(POLL_SECONDS / 4)
        return found

    def _poll_until_stopped(self) -> None:
        try:
            while not self._end.wait(POLL_SECONDS):
                self._poll()
        except BaseException as error:  # noqa: BLE001  # raised again by wait_for
            self._error = error

    def _poll(self) -> None:
        try:
            self._poll_status()
            self.workers = list_workers(self._api.list_pods(f"sailvl.dev/run={self._run}"))
        except ClusterReader.ERRORS:  # the next poll reads it again
            return
        stages = [s for s in self.status.get("stages", []) if s["state"] != "Pending"]
        if not stages:
            return
        stage = stages[-1]
        point = ProgressPoint(at=time.time(), stage=stage["name"], attempt=stage["attempt"], state=stage["state"])
        first = [w for w in self.workers if (w.stage, w.attempt, w.index) == (point.stage, point.attempt, 0)]
        self._add(_read_progress(first[0].ip, point) if first else point)

    def _add(self, point: ProgressPoint) -> None:
        points = self.observations.points
        if not points or replace(points[-1], at=point.at) != point:
            points.append(point)

    def _poll_status(self) -> None:
        run = self._api.get_run(self._run)
        version = run["metadata"]["resourceVersion"]
        if version == self._version or "status" not in run:
            return
        row, now = self._api.get_printed_row(self._run), time.time()
        self._version = version
        self.observations.statuses.append((now, run["status"]))
        row.pop("AGE", None)
        if not self.observations.printed_rows or self.observations.printed_rows[-1][1] != row:
            self.observations.printed_rows.append((now, row))


def _read_progress(ip: str, point: ProgressPoint) -> ProgressPoint:
    """Return the point with a worker's own progress, if it answers."""
    try:
        with urllib.request.urlopen(f"http://{ip}:9400/progress", timeout=PROGRESS_TIMEOUT_SECONDS) as answer:
            progress = json.load(answer)
    except (OSError, ValueError):
        return point
    saved = progress.get("checkpoint")
    return replace(
        point,
        attempt=progress["attempt"],
        phase=progress["phase"],
        step=progress["step"],
        steps=progress["steps"],
        saved=None if saved is None else saved["step"],
    )
