"""What is seen of one run while things are done to it: a thread that looks four times a second.

Progress is read from the first worker's own server, not from the status, which the operator brings up to date every
five seconds.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.faults.api import Api
from tests.faults.host import Worker, list_workers

LOOK_SECONDS = 0.25
PROGRESS_TIMEOUT = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where the run stood."""

    at: float
    """Unix seconds."""
    stage: str
    attempt: int
    state: str
    """Of the stage, in the status."""
    phase: str = ""
    """What follows is the first worker's own word; empty: none could be had."""
    step: int = 0
    steps: int = 0
    saved: int | None = None
    """Step of the newest checkpoint that it knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """All that was seen, each list in the order of time and without repetitions."""

    points: list[Point] = field(default_factory=list)
    statuses: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    lines: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    """What `kubectl get svr` said, its age left out."""


class Recorder:
    """Of one run, from `start` to `stop`."""

    def __init__(self, api: Api, run: str) -> None:
        self.record = Record()
        self.workers: list[Worker] = []
        self._api, self._run, self._version = api, run, ""
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._look_on, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    @property
    def status(self) -> dict[str, Any]:
        """The newest."""
        return self.record.statuses[-1][1] if self.record.statuses else {}

    @property
    def now(self) -> Point | None:
        """The newest point."""
        return self.record.points[-1] if self.record.points else None

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's newest status."""
        return next((s for s in self.status.get("stages", []) if s["name"] == name), {})

    def condition(self, kind: str) -> dict[str, Any]:
        """The newest of its type if it is true."""
        found = (c for c in self.status.get("conditions", []) if c["type"] == kind and c["status"] == "True")
        return next(found, {})

    def wait(self, what: str, is_so: Callable[[], Any], seconds: float) -> Any:
        """What `is_so` says once it says something."""
        until = time.monotonic() + seconds
        while not (found := is_so()):
            if self._error is not None:
                raise self._error
            assert time.monotonic() < until, f"not within {seconds:.0f} s: {what}; {self.now}; {self.status}"
            time.sleep(LOOK_SECONDS / 4)
        return found

    def _look_on(self) -> None:
        try:
            while not self._end.wait(LOOK_SECONDS):
                self._look()
        except BaseException as error:  # noqa: BLE001  # told to whoever waits
            self._error = error

    def _look(self) -> None:
        try:
            self._look_at_status()
            self.workers = list_workers(self._api.pods(f"sailvl.dev/run={self._run}"))
        except Api.ERRORS:  # looked at again in a moment
            return
        stages = [s for s in self.status.get("stages", []) if s["state"] != "Pending"]
        if not stages:
            return
        stage = stages[-1]
        point = Point(at=time.time(), stage=stage["name"], attempt=stage["attempt"], state=stage["state"])
        first = [w for w in self.workers if (w.stage, w.attempt, w.index) == (point.stage, point.attempt, 0)]
        self._add(_ask(first[0].ip, point) if first else point)

    def _add(self, point: Point) -> None:
        points = self.record.points
        if not points or replace(points[-1], at=point.at) != point:
            points.append(point)

    def _look_at_status(self) -> None:
        run = self._api.run(self._run)
        version = run["metadata"]["resourceVersion"]
        if version == self._version or "status" not in run:
            return
        line, now = self._api.line(self._run), time.time()
        self._version = version
        self.record.statuses.append((now, run["status"]))
        line.pop("AGE", None)
        if not self.record.lines or self.record.lines[-1][1] != line:
            self.record.lines.append((now, line))


def _ask(ip: str, point: Point) -> Point:
    """The point with what a worker says of itself, if it answers."""
    try:
        with urllib.request.urlopen(f"http://{ip}:9400/progress", timeout=PROGRESS_TIMEOUT) as answer:
            said = json.load(answer)
    except (OSError, ValueError):
        return point
    saved = said.get("checkpoint")
    return replace(
        point,
        attempt=said["attempt"],
        phase=said["phase"],
        step=said["step"],
        steps=said["steps"],
        saved=None if saved is None else saved["step"],
    )
