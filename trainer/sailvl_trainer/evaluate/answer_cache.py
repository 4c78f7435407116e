"""Answers that an attempt leaves for the next one: lines below <output>/parts, a file a rank and attempt.

A batch is known by what is asked in it, so its answers are used wherever it was answered, and never for another file's
questions. A line that breaks off was being written when the rank died, and is passed over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.evaluate.tsv import Question
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import broadcast_object
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.errors import translate_storage_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    benchmark: str
    batch: str
    answers: list[str]


class KeptAnswers:
    """Of one evaluate stage. Every rank makes one; all see the same."""

    def __init__(self, context: Context) -> None:
        folder = context.files.output / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{context.stage.attempt:04d}-{context.rank:05d}.jsonl"
        self._found: dict[tuple[str, str], list[str]] = broadcast_object(_read(folder) if context.is_first else None)

    def find(self, benchmark: str, batch: Sequence[Question]) -> list[str] | None:
        """What an earlier attempt has answered to these questions."""
        return self._found.get((benchmark, _fingerprint(batch)))

    def add(self, benchmark: str, batch: Sequence[Question], answers: list[str]) -> None:
        """On the disk when it returns."""
        with translate_storage_errors(self._path), self._path.open("ab") as file:
            file.write(encode(_Line(benchmark=benchmark, batch=_fingerprint(batch), answers=answers)) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _fingerprint(batch: Sequence[Question]) -> str:
    return hashlib.sha256(encode(batch)).hexdigest()


def _read(folder: Path) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for data in path.read_bytes().splitlines():
            try:
                line = decode(_Line, data)
            except ValueError:
                continue
            found[line.benchmark, line.batch] = line.answers
    return found
