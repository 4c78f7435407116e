"""Answers that an attempt leaves for the next one: lines below <output>/parts, a file a rank and attempt.

A batch of questions is the same in every attempt and on any number of ranks, so its answers are used wherever it was
answered. A line that breaks off was being written when the rank died, and is passed over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import broadcast
from sailvl_trainer.runtime.documents import decode, encode

Batches = dict[int, list[str]]
"""Number of a batch → its answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    benchmark: str
    batch: int
    answers: list[str]


class KeptAnswers:
    """Of one evaluate stage. Every rank makes one; all see the same."""

    def __init__(self, context: Context) -> None:
        folder = context.files.output / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{context.stage.attempt:04d}-{context.rank:05d}.jsonl"
        self._found: dict[str, Batches] = broadcast(_read(folder) if context.is_first else None)

    def get(self, benchmark: str) -> Batches:
        """What earlier attempts have answered."""
        return self._found.get(benchmark, {})

    def add(self, benchmark: str, batch: int, answers: list[str]) -> None:
        """On the disk when it returns."""
        with self._path.open("ab") as file:
            file.write(encode(_Line(benchmark=benchmark, batch=batch, answers=answers)) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(folder: Path) -> dict[str, Batches]:
    found: dict[str, Batches] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for data in path.read_bytes().splitlines():
            try:
                line = decode(_Line, data)
            except ValueError:
                continue
            found.setdefault(line.benchmark, {})[line.batch] = line.answers
    return found
