"""Answers of earlier attempts: JSON lines below <output>/artifacts, one file per rank and attempt.

Answers are keyed by benchmark and by a hash of the batch's questions, so that they are reused on any rank but never for
changed questions. A truncated line, which a rank was writing when it died, is ignored. Used by benchmark.py.
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
class _CachedBatch:
    """One line of a file."""

    benchmark: str
    batch: str
    """Hash of the batch's questions."""
    answers: list[str]


class AnswerCache:
    """The answers of one evaluate stage. COLLECTIVE: every rank creates one, and all see the same earlier answers."""

    def __init__(self, context: Context) -> None:
        folder = context.files.output / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{context.stage.attempt:04d}-{context.rank:05d}.jsonl"
        self._answers: dict[tuple[str, str], list[str]] = broadcast_object(
            _read_answers(folder) if context.is_first else None
        )

    def find(self, benchmark: str, batch: Sequence[Question]) -> list[str] | None:
        """Return the answers of an earlier attempt to these questions, or None."""
        return self._answers.get((benchmark, _hash_batch(batch)))

    def add(self, benchmark: str, batch: Sequence[Question], answers: list[str]) -> None:
        """Append a batch's answers to this rank's file; they are on the disk on return. Raises StorageError."""
        line = _CachedBatch(benchmark=benchmark, batch=_hash_batch(batch), answers=answers)
        with translate_storage_errors(self._path), self._path.open("ab") as file:
            file.write(encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _hash_batch(batch: Sequence[Question]) -> str:
    return hashlib.sha256(encode(batch)).hexdigest()


def _read_answers(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Return the answers by benchmark and hash of the batch."""
    answers: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for data in path.read_bytes().splitlines():
            try:
                line = decode(_CachedBatch, data)
            except ValueError:
                continue
            answers[line.benchmark, line.batch] = line.answers
    return answers
