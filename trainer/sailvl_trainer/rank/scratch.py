"""The worker's scratch folder: what its entry and its ranks leave for each other. Lost with the worker."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where each thing lies under the folder."""

    root: Path

    @property
    def stop_file(self) -> Path:
        """Its being there asks the ranks to save and stop."""
        return self.root / "stop"

    @property
    def progress_file(self) -> Path:
        """The progress document of the worker's lowest rank; also its heartbeat."""
        return self.root / "progress.json"

    def progress_path(self, local_rank: int) -> Path:
        """Every rank's own; that of the lowest is the worker's."""
        return self.progress_file if local_rank == 0 else self.root / f"progress-{local_rank}.json"

    @property
    def metrics(self) -> Path:
        """prometheus_client's multiprocess files."""
        return self.root / "metrics"

    @property
    def elastic(self) -> Path:
        """The error files that torch's agent reads."""
        return self.root / "elastic"

    @property
    def stacks(self) -> Path:
        """<pid>.txt: where each rank is, when it is asked."""
        return self.root / "stacks"

    def prepare(self) -> None:
        """Make it, without what a predecessor left."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        for path in self.root.glob("progress*.json"):
            path.unlink()
        for folder in (self.metrics, self.elastic, self.stacks):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
