"""A rank's telemetry: its progress document, which is also its heartbeat, and its Prometheus metrics.

The document is written to the worker's scratch directory; the worker serves rank 0's and watches all of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from sailvl_trainer.contract import Checkpoint, Phase, Progress, Stage
from sailvl_trainer.rank.metrics import TrainerMetrics
from sailvl_trainer.storage.codec import decode, encode, keep_finite
from sailvl_trainer.storage.files import translate_storage_errors

RESTARTS_VARIABLE = "SAILVL_RESTARTS_SO_FAR"
"""Variable in which the worker's agent passes its ranks the number of restarts in place so far."""
WRITE_INTERVAL_SECONDS = 0.5
"""Shortest time between two writes of the progress document, unless the phase changes."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Telemetry:
    """Progress and metrics of one rank."""

    def __init__(self, stage: Stage, path: Path | None, *, rank: int = 0) -> None:
        """`path` is where the progress document is written, if anywhere; rank 0 also sets the run's metrics."""
        self.registry = CollectorRegistry()
        self.metrics = TrainerMetrics(self.registry)
        self._labels = {"run": stage.run, "stage": stage.stage}
        self._path, self._rank, self._written = path, rank, 0.0
        self.progress = _load_progress(stage.attempt, path)
        self._starting_since = self.progress.time
        self.update()
        self.write()

    def update(
        self,
        *,
        phase: Phase | None = None,
        step: int | None = None,
        steps: int | None = None,
        unit: Literal["steps", "samples", "questions"] | None = None,
        tokens: int | None = None,
        samples: int | None = None,
        lost_steps: int | None = None,
        eta_seconds: float | None = None,
        metrics: Mapping[str, float] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Set the given fields and the time of the heartbeat; metrics that are not finite are dropped."""
        if self.progress.phase == "starting":
            self._add_starting_seconds()
        values = keep_finite(metrics or {})
        changes: dict[str, Any] = {
            "phase": phase,
            "step": step,
            "steps": steps,
            "unit": unit,
            "tokens": tokens,
            "samples": samples,
            "lost_steps": lost_steps,
            "eta_seconds": eta_seconds,
            "checkpoint": checkpoint,
            "metrics": self.progress.metrics | values,
            "time": time.time(),
        }
        self.progress = replace(self.progress, **{k: v for k, v in changes.items() if v is not None})
        if self._rank == 0:
            self._publish_values(values)
        if phase is not None or time.monotonic() - self._written >= WRITE_INTERVAL_SECONDS:
            self.write()

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of a block to an activity: training, dataWait, checkpoint or evaluating."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._add_seconds(name, time.monotonic() - start)

    def count_samples(self, outcome: str, number: int = 1) -> None:
        """Count samples by outcome, for example trained, kept or duplicate."""
        self.metrics.samples.labels(**self._labels, outcome=outcome).inc(number)

    def write(self) -> None:
        """Write the progress document through a rename, so that readers never see a part of it."""
        self._written = time.monotonic()
        self._publish_memory()
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        with translate_storage_errors(self._path):
            temporary.write_bytes(encode(self.progress))
            temporary.replace(self._path)

    def _add_starting_seconds(self) -> None:
        now = time.time()
        self._add_seconds("starting", max(0.0, now - self._starting_since))
        self._starting_since = now

    def _add_seconds(self, name: str, spent: float) -> None:
        seconds = self.progress.seconds
        self.progress = replace(self.progress, seconds=seconds | {name: seconds.get(name, 0.0) + spent})
        self.metrics.seconds.labels(**self._labels, activity=name).inc(spent)

    def _publish_values(self, values: Mapping[str, float]) -> None:
        progress, metrics = self.progress, self.metrics
        metrics.step.labels(**self._labels).set(progress.step)
        metrics.steps.labels(**self._labels).set(progress.steps)
        metrics.tokens.labels(**self._labels).set(progress.tokens)
        if progress.checkpoint is not None:
            metrics.checkpoint_step.labels(**self._labels).set(progress.checkpoint.step)
        for name, value in values.items():
            gauge, labels = metrics.find_gauge(name, is_benchmark=progress.unit == "questions")
            gauge.labels(**self._labels, **labels).set(value)

    def _publish_memory(self) -> None:
        for kind, size in _measure_memory().items():
            self.metrics.memory.labels(**self._labels, kind=kind).set(size)


def _load_progress(attempt: int, path: Path | None) -> Progress:
    """Return the progress of this attempt so far: the worker or an earlier start of this rank wrote it."""
    restarts = int(os.environ.get(RESTARTS_VARIABLE, "0"))
    if path is not None and path.exists():
        before = decode(Progress, path.read_bytes())
        if before.attempt == attempt:
            return replace(before, phase="starting", eta_seconds=None, in_place_restarts=restarts)
    return Progress(attempt=attempt, phase="starting", time=time.time(), in_place_restarts=restarts)


def _measure_memory() -> dict[str, int]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    torch = sys.modules.get("torch")  # importing torch only for this would take seconds
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {"resident": resident}
    return {"resident": resident, "accelerator_peak": torch.cuda.max_memory_allocated()}
