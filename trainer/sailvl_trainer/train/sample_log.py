"""Which samples each step used: one line a step in ATTEMPTS_DIR/<attempt>.samples.jsonl, by the first rank.

With the lineage of attempts it proves that every sample was used exactly once: of an attempt, the lines up to the
checkpoint that the next attempt started from count. Samples that were left out on purpose are marked as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sailvl_trainer.storage.atomic import sync_file
from sailvl_trainer.storage.errors import translate_storage_errors
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import read_lineage


class Ledger:
    """Appends; a step that is done again after a restart in place is written again, and the later line counts."""

    def __init__(self, files: StageFiles, attempt: int) -> None:
        files.attempts.mkdir(parents=True, exist_ok=True)
        self._path = ledger_path(files, attempt)
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")

    def write(self, step: int, samples: tuple[int, ...], *, is_skipped: bool = False) -> None:
        """The samples of an optimizer step, over all ranks; `step` from 1."""
        entry: dict[str, Any] = {"step": step, "samples": samples}
        self._append(json.dumps(entry | ({"skipped": True} if is_skipped else {})) + "\n")

    def sync(self) -> None:
        """Before a checkpoint: what it stands for is on the disk too."""
        if self._path.exists():
            sync_file(self._path)

    def _append(self, text: str) -> None:
        """Closed each time: other machines see the line, and a kill loses none."""
        with translate_storage_errors(self._path), self._path.open("a") as file:
            file.write(text)


def ledger_path(files: StageFiles, attempt: int) -> Path:
    """Where an attempt's lines are."""
    return files.attempts / f"{attempt}.samples.jsonl"


def read_ledger(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Step to the samples that it was trained on, along the lineage that ends with an attempt."""
    return {entry["step"]: entry["samples"] for entry in _entries(files, last_attempt) if not entry.get("skipped")}


def count_lost(files: StageFiles, attempt: int, start: int) -> int:
    """Steps done in vain when an attempt goes on from step `start`: all that were done, but for those up to it."""
    paths = (ledger_path(files, number) for number in range(1, attempt + 1))
    return max(0, sum(1 for path in paths if path.exists() for _ in _lines(path)) - start)


def read_skipped(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Step to the samples that were left out on purpose, along the same lineage."""
    return {entry["step"]: entry["samples"] for entry in _entries(files, last_attempt) if entry.get("skipped")}


def _entries(files: StageFiles, last_attempt: int) -> list[dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for attempt, first in _chain(files, last_attempt):
        steps = {step: entry for step, entry in steps.items() if step <= first}
        path = ledger_path(files, attempt)
        for entry in _lines(path) if path.exists() else ():
            steps[entry["step"]] = entry
    return list(steps.values())


def _chain(files: StageFiles, last_attempt: int) -> Iterator[tuple[int, int]]:
    """Attempts in order, each with the step it started from."""
    for attempt in range(1, last_attempt + 1):
        lineage = read_lineage(files, attempt)
        if lineage is not None:
            yield attempt, 0 if lineage.start is None else lineage.start.step


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """A line that a kill tore in two is left out: no checkpoint was saved after its step."""
    for line in path.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield entry
