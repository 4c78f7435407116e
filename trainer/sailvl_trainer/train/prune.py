"""Which checkpoints stay: the newest few on the chain of attempts, and nothing else; called after each save."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage
from sailvl_trainer.runtime.documents import decode
from sailvl_trainer.runtime.files import StageFiles


def prune(files: StageFiles, attempt: int, keep: int) -> list[Path]:
    """Remove what no resume needs, of this attempt and of those before it; what was removed.

    Manifests go first, so no half folder looks whole. Later attempts are left alone: this one may be cut off already.
    """
    kept = set(sorted(_chain(files, attempt), key=_step)[-max(1, keep) :])
    removed = [folder for folder in _folders(files, range(1, attempt + 1)) if folder not in kept]
    for folder in removed:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def _chain(files: StageFiles, attempt: int) -> Iterator[Path]:
    """Whole checkpoints that this attempt's weights came through: its own, then back along the lineage."""
    last: int | None = None
    while True:
        for folder in _folders(files, [attempt]):
            if (folder / MANIFEST_FILE).exists() and (last is None or _step(folder) <= last):
                yield folder
        start = _read_start(files, attempt)
        if start is None:
            return
        last, attempt = start.step, int(Path(start.path).parent.name.removeprefix("attempt-"))


def _read_start(files: StageFiles, attempt: int) -> Checkpoint | None:
    path = files.attempts / f"{attempt}.json"
    return decode(Lineage, path.read_bytes()).start if path.exists() else None


def _folders(files: StageFiles, attempts: range | list[int]) -> Iterator[Path]:
    for attempt in attempts:
        yield from files.checkpoint_dir(attempt, 0).parent.glob("step-*")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
