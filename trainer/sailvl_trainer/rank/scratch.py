"""The worker's scratch directory, in which the worker and its ranks exchange files. It is lost with the worker."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Scratch:
    """Paths below the scratch directory."""

    root: Path

    @property
    def stop_file(self) -> Path:
        """File whose existence asks the ranks to save a checkpoint and stop."""
        return self.root / "stop"

    @property
    def progress_file(self) -> Path:
        """Progress document of the worker's lowest rank, which the worker serves; it is also the rank's heartbeat."""
        return self.root / "progress.json"

    def progress_path(self, local_rank: int) -> Path:
        """Return the path of a rank's progress document."""
        return self.progress_file if local_rank == 0 else self.root / f"progress-{local_rank}.json"

    @property
    def metrics_dir(self) -> Path:
        """Directory of prometheus_client's multiprocess files."""
        return self.root / "metrics"

    @property
    def elastic_dir(self) -> Path:
        """Directory in which torch's elastic agent keeps the error files of the ranks."""
        return self.root / "elastic"

    @property
    def stacks_dir(self) -> Path:
        """Directory of the stacks that ranks write, as <pid>.txt, on a signal."""
        return self.root / "stacks"

    def prepare(self) -> None:
        """Create the directory and remove what an earlier worker left in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        for path in self.root.glob("progress*.json"):
            path.unlink()
        for folder in (self.metrics_dir, self.elastic_dir, self.stacks_dir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
