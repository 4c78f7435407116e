"""Which samples each step used: one line a step in ATTEMPTS_DIR/<attempt>.samples.jsonl, by the first rank.

With the lineage of attempts it proves that every sample was used exactly once: of an attempt, the lines up to the
checkpoint that the next attempt started from count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.contract import Lineage
from sailvl_trainer.runtime.documents import decode
from sailvl_trainer.runtime.files import StageFiles


class Ledger:
    """Appends; a step that is done again after a restart in place is written again, and the later line counts."""

    def __init__(self, files: StageFiles, attempt: int) -> None:
        files.attempts.mkdir(parents=True, exist_ok=True)
        self._path = ledger_path(files, attempt)
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")

    def write(self, step: int, samples: tuple[int, ...]) -> None:
        """The samples of an optimizer step, over all ranks; `step` from 1."""
        self._append(json.dumps({"step": step, "samples": samples}) + "\n")

    def _append(self, text: str) -> None:
        """Closed each time: other machines see the line, and a kill loses none."""
        with self._path.open("a") as file:
            file.write(text)


def ledger_path(files: StageFiles, attempt: int) -> Path:
    """Where an attempt's lines are."""
    return files.attempts / f"{attempt}.samples.jsonl"


def read_ledger(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Step to samples along the lineage that ends with an attempt."""
    steps: dict[int, list[int]] = {}
    for attempt, first in _chain(files, last_attempt):
        steps = {step: samples for step, samples in steps.items() if step <= first}
        path = ledger_path(files, attempt)
        for step, samples in _lines(path) if path.exists() else ():
            steps[step] = samples
    return steps


def _chain(files: StageFiles, last_attempt: int) -> Iterator[tuple[int, int]]:
    """Attempts in order, each with the step it started from."""
    for attempt in range(1, last_attempt + 1):
        path = files.attempts / f"{attempt}.json"
        if path.exists():
            start = decode(Lineage, path.read_bytes()).start
            yield attempt, 0 if start is None else start.step


def _lines(path: Path) -> Iterator[tuple[int, list[int]]]:
    """A line that a kill tore in two is left out: no checkpoint was saved after its step."""
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield entry["step"], entry["samples"]
