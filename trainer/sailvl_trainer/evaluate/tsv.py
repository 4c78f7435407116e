"""VLMEvalKit's benchmark files: a TSV with index, image (base64), question, answer, and A, B, C, … for choices."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from sailvl_trainer.runtime.errors import DataError

csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    index: str
    image: bytes | None
    question: str
    answer: str
    choices: dict[str, str] = field(default_factory=dict)
    """Letter to text."""
    hint: str = ""


def read_tsv(path: Path, limit: int = 0) -> list[Question]:
    """All questions, or the first `limit`. Raises DataError that names the row and what is missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"benchmark {path}: {error}") from error
    images: dict[str, str] = {row.get("index") or "": row.get("image") or "" for row in rows}
    chosen = rows[:limit] if limit else rows
    return [_question(path, number, row, images) for number, row in enumerate(chosen, 2)]


def _question(path: Path, number: int, row: dict[str, str | None], images: dict[str, str]) -> Question:
    missing = [name for name in ("index", "question", "answer") if not row.get(name)]
    if missing:
        raise DataError(f"benchmark {path}, line {number}: no {', '.join(missing)}")
    return Question(
        index=row["index"] or "",
        image=_image(path, number, row, images),
        question=row["question"] or "",
        answer=row["answer"] or "",
        choices={letter: text for letter in ascii_uppercase if (text := row.get(letter) or "")},
        hint=row.get("hint") or "",
    )


def _image(path: Path, number: int, row: dict[str, str | None], images: dict[str, str]) -> bytes | None:
    """The picture: base64, or the index of the row that has it, or a file beside the TSV."""
    if row.get("image_path"):
        return (path.parent / str(row["image_path"])).read_bytes()
    text = row.get("image") or ""
    text = images.get(text, text) if len(text) < 64 else text
    try:
        return base64.b64decode(text, validate=True) if text else None
    except binascii.Error as error:
        raise DataError(f"benchmark {path}, line {number}: image is no base64: {error}") from error
