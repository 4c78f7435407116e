"""Log of the samples that each step used: one JSON line per step in ATTEMPTS_DIR/<attempt>.samples.jsonl.

Written by the first rank. Together with the lineage of attempts it proves that every sample was used exactly once per
epoch: the lines of an attempt count up to the checkpoint that the next attempt started from. Skipped samples are
marked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file
from sailvl_trainer.storage.documents import iterate_lines, set_aside
from sailvl_trainer.storage.files import sync_file, translate_storage_errors
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import read_lineage


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One line of a log."""

    step: int
    samples: list[int]
    skipped: bool = False


class SampleLog:
    """Appends lines; a step repeated after a restart in place is logged again, and its later line counts."""

    def __init__(self, files: StageFiles, attempt: int) -> None:
        files.attempts.mkdir(parents=True, exist_ok=True)
        self._path = sample_log_path(files, attempt)
        if not _ends_with_line_break(self._path):
            self._append(b"\n")

    def write(self, step: int, samples: tuple[int, ...], *, is_skipped: bool = False) -> None:
        """Append the samples of one optimizer step over all ranks; steps are numbered from 1."""
        self._append(encode(_Entry(step=step, samples=list(samples), skipped=is_skipped)) + b"\n")

    def sync(self) -> None:
        """Flush the log to disk; called before a checkpoint is saved, whose steps it documents."""
        if self._path.exists():
            sync_file(self._path)

    def _append(self, line: bytes) -> None:
        """Append and close the file, so that other nodes see the line and a kill loses none."""
        with translate_storage_errors(self._path), self._path.open("ab") as file:
            file.write(line)


def sample_log_path(files: StageFiles, attempt: int) -> Path:
    """Return the path of an attempt's log."""
    return files.attempts / f"{attempt}.samples.jsonl"


def read_trained_samples(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Return the samples trained on by step, along the lineage that ends with `last_attempt`."""
    return {entry.step: entry.samples for entry in _read_entries(files, last_attempt) if not entry.skipped}


def read_skipped_samples(files: StageFiles, last_attempt: int) -> dict[int, list[int]]:
    """Return the samples skipped by step, along the lineage that ends with `last_attempt`."""
    return {entry.step: entry.samples for entry in _read_entries(files, last_attempt) if entry.skipped}


def count_lost_steps(files: StageFiles, attempt: int, start: int) -> int:
    """Return how many steps are repeated because `attempt` resumes at step `start`: all logged ones beyond `start`."""
    count = sum(1 for number in range(1, attempt + 1) for _ in _iterate_entries(files, number))
    return max(0, count - start)


def _read_entries(files: StageFiles, last_attempt: int) -> list[_Entry]:
    """Return the entries of the lineage; an attempt's start discards its predecessors' later steps."""
    steps: dict[int, _Entry] = {}
    for attempt, start in _attempt_starts(files, last_attempt):
        steps = {step: entry for step, entry in steps.items() if step <= start}
        for entry in _iterate_entries(files, attempt):
            steps[entry.step] = entry
    return list(steps.values())


def _attempt_starts(files: StageFiles, last_attempt: int) -> Iterator[tuple[int, int]]:
    """Yield the attempts in order, each with the step that it started from."""
    for attempt in range(1, last_attempt + 1):
        lineage = read_lineage(files, attempt)
        if lineage is not None:
            yield attempt, 0 if lineage.start is None else lineage.start.step


def _iterate_entries(files: StageFiles, attempt: int) -> Iterator[_Entry]:
    """Return an attempt's entries, without a line that a kill cut off: no checkpoint was saved after its step."""
    return iterate_lines(_Entry, sample_log_path(files, attempt), files.roots)


def _ends_with_line_break(path: Path) -> bool:
    """Return whether the last line is complete; what is no regular file is set aside, for a log to take its place."""
    try:
        with open_data_file(path, DataRoots.resolve(path.parent)) as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except FileNotFoundError:
        return True
    except RefusedFileError:
        set_aside(path)
        return True
