"""Log of the samples that each step used: one JSON line per step in ATTEMPTS_DIR/<attempt>.samples.jsonl.

Written by the first rank. Together with the lineage of attempts it proves that every sample was used exactly once per
epoch: the lines of an attempt count up to the checkpoint that the next attempt started from. Skipped samples are
marked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sailvl_trainer.storage.files import sync_file, translate_storage_errors
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import read_lineage


class SampleLog:
    """Appends lines; a step repeated after a restart in place is logged again, and its later line counts."""

    def __init__(self, files: StageFiles, attempt: int) -> None:
        files.attempts.mkdir(parents=True, exist_ok=True)
        self._path = sample_log_path(files, attempt)
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")

    def write(self, step: int, samples: tuple[int, ...], *, is_skipped: bool = False) -> None:
        """Append the samples of one optimizer step over all ranks; steps are numbered from 1."""
        entry: dict[str, Any] = {"step": step, "samples": samples}
        self._append(json.dumps(entry | ({"skipped": True} if is_skipped else {})) + "\n")

    def sync(self) -> None:
        """Flush the log to disk; called before a checkpoint is saved, whose steps it documents."""
        if self._path.exists():
            sync_file(self._path)

    def _append(self, text: str) -> None:
        """Append and close the file, so that other nodes see the line and a kill loses none."""
        with translate_storage_errors(self._path), self._path.open("a") as file:
            file.write(text)


def sample_log_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of an attempt's log."""
    return files.attempts / f"{attempt}.samples.jsonl"


def read_trained_samples(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Return the samples trained on by step, along the lineage that ends with `last_attempt`."""
    return {entry["step"]: entry["samples"] for entry in _entries(files, last_attempt) if not entry.get("skipped")}


def read_skipped_samples(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Return the samples skipped by step, along the lineage that ends with `last_attempt`."""
    return {entry["step"]: entry["samples"] for entry in _entries(files, last_attempt) if entry.get("skipped")}


def count_lost_steps(files: StageFiles, attempt: int, start: int) -> int:
    """Return how many steps are repeated because `attempt` resumes at step `start`: all logged ones beyond `start`."""
    paths = (sample_log_path(files, number) for number in range(1, attempt + 1))
    return max(0, sum(1 for path in paths if path.exists() for _ in _lines(path)) - start)


def _entries(files: StageFiles, last_attempt: int) -> list[dict[str, Any]]:
    """Return the entries of the lineage; an attempt's start discards its predecessors' later steps."""
    steps: dict[int, dict[str, Any]] = {}
    for attempt, start in _attempt_starts(files, last_attempt):
        steps = {step: entry for step, entry in steps.items() if step <= start}
        path = sample_log_path(files, attempt)
        for entry in _lines(path) if path.exists() else ():
            steps[entry["step"]] = entry
    return list(steps.values())


def _attempt_starts(files: StageFiles, last_attempt: int) -> Iterator[tuple[int, int]]:
    """Yield the attempts in order, each with the step that it started from."""
    for attempt in range(1, last_attempt + 1):
        lineage = read_lineage(files, attempt)
        if lineage is not None:
            yield attempt, 0 if lineage.start is None else lineage.start.step


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file, without a line that a kill cut off: no checkpoint was saved after its step."""
    for line in path.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield entry
