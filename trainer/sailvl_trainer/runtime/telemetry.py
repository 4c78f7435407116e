"""What a rank says of itself: a progress document (also the heartbeat) in the worker's scratch folder, and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from sailvl_trainer.contract import Checkpoint, Phase, Progress, Stage
from sailvl_trainer.runtime.documents import encode
from sailvl_trainer.runtime.metrics import TrainerMetrics

PROGRESS_FILE = "progress.json"
WRITE_SECONDS = 0.5
"""Between two writes of the progress document, at least, unless the phase changes."""


class Telemetry:
    """One rank's progress. `path`: where the document goes; None on ranks whose worker has a lower one."""

    def __init__(self, stage: Stage, path: Path | None) -> None:
        self.registry = CollectorRegistry()
        self._metrics = TrainerMetrics(self.registry)
        self._labels = {"namespace": stage.namespace, "run": stage.run, "stage": stage.stage}
        self._path, self._written = path, 0.0
        self.progress = Progress(attempt=stage.attempt, phase="starting", time=time.time())

    def update(
        self,
        *,
        phase: Phase | None = None,
        metrics: Mapping[str, float] | None = None,
        checkpoint: Checkpoint | None = None,
        **fields: Any,
    ) -> None:
        """Change what is given (step, steps, unit, tokens, samples, eta_seconds); also the heartbeat."""
        changes = fields | {"time": time.time()}
        if phase is not None:
            changes["phase"] = phase
        if checkpoint is not None:
            changes["checkpoint"] = checkpoint
        self._count(fields, metrics or {})
        self.progress = replace(self.progress, metrics=self.progress.metrics | dict(metrics or {}), **changes)
        if phase is not None or time.monotonic() - self._written >= WRITE_SECONDS:
            self.write()

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Add a block's wall seconds to an activity: training, data_wait, checkpoint, evaluating."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            seconds = self.progress.seconds
            self.progress = replace(self.progress, seconds=seconds | {name: seconds.get(name, 0.0) + spent})
            self._metrics.seconds.labels(**self._labels, activity=name).inc(spent)

    def count_samples(self, outcome: str, number: int = 1) -> None:
        """Samples by what became of them: trained, kept, duplicate, …"""
        self._metrics.samples.labels(**self._labels, outcome=outcome).inc(number)

    def write(self) -> None:
        """The document as it stands; readers see it whole."""
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(encode(self.progress))
        temporary.replace(self._path)
        self._written = time.monotonic()

    def _count(self, fields: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        if "step" in fields:
            self._metrics.step.labels(**self._labels).set(fields["step"])
        if "steps" in fields:
            self._metrics.steps.labels(**self._labels).set(fields["steps"])
        if "tokens" in fields:
            self._metrics.tokens.labels(**self._labels).inc(max(0, fields["tokens"] - self.progress.tokens))
        for name, value in metrics.items():
            self._metrics.value.labels(**self._labels, name=name).set(value)
