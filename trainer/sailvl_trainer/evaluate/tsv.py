"""VLMEvalKit's benchmark files: a TSV with index, image, question, answer, and A, B, C, … for choices."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from sailvl_trainer.data.images import UnreadableImage, read_size
from sailvl_trainer.errors import DataError

csv.field_size_limit(sys.maxsize)
REQUIRED = ("index", "question", "answer")
KNOWN = (*REQUIRED, "image", "image_path", "hint")
EMPTY = frozenset({"", "nan", "NaN"})
"""Cells that hold nothing, in pandas' words too."""
REFERENCE = 64
"""Image cells up to so many characters are the index of the row that has the picture."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    index: str
    images: tuple[bytes, ...]
    """Encoded pictures, all shown before the question."""
    question: str
    answer: str
    choices: dict[str, str] = field(default_factory=dict)
    """Letter to text."""
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: Path
    images: Mapping[str, str]
    """Image cell by index."""

    def error(self, line: int, words: str) -> DataError:
        return DataError(f"benchmark {self.path}, row {line}: {words}")


def read_tsv(path: Path, limit: int = 0) -> list[Question]:
    """All questions, or the first `limit`. Raises DataError that names the row and what to write instead.

    Row 1 is the header. A picture is base64, the index of the row that has it, a list of these as Python writes it, or
    a path in `image_path`, relative to the TSV's folder, which is looked at where `image` is empty.
    """
    rows = [{name: "" if cell.strip() in EMPTY else cell for name, cell in row.items()} for row in _read_rows(path)]
    file = _File(path=path, images={row["index"]: row.get("image", "") for row in rows})
    if len(file.images) < len(rows):
        twice, _ = Counter(row["index"] for row in rows).most_common(1)[0]
        raise DataError(f"benchmark {path}: index {twice} stands twice; give every row an index of its own")
    return [_question(file, number, row) for number, row in enumerate(rows[:limit] if limit else rows, 2)]


def parse_list(text: str) -> list[object] | None:
    """A list as Python writes it; None for anything else."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return list(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return None


def _read_rows(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="", strict=True)
            rows: list[Row] = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"benchmark {path}: {error}; it has to be a TSV in UTF-8") from error
    columns = reader.fieldnames or []
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise DataError(f"benchmark {path}: no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
    for name in columns:
        if name not in KNOWN and name.strip().lower() in KNOWN:
            raise DataError(f"benchmark {path}: a column {name!r}; write {name.strip().lower()}")
    if not rows:
        raise DataError(f"benchmark {path}: no question")
    for number, row in enumerate(rows, 2):
        if None in row:
            raise DataError(f"benchmark {path}, row {number}: more cells than the header; quote cells that hold tabs")
    return rows


def _question(file: _File, line: int, row: Row) -> Question:
    empty = [name for name in REQUIRED if not row[name].strip()]
    if empty:
        raise file.error(line, f"{', '.join(empty)} empty; leave rows out that can't be scored")
    return Question(
        index=row["index"],
        images=_decode(file, line, row) if row.get("image") else _read_paths(file, line, row.get("image_path", "")),
        question=row["question"],
        answer=row["answer"],
        choices={letter: text for letter in ascii_uppercase if (text := row.get(letter, ""))},
        hint=row.get("hint", ""),
    )


def _read_paths(file: _File, line: int, cell: str) -> tuple[bytes, ...]:
    pictures = []
    for name in _split(cell):
        try:
            data = (file.path.parent / name).read_bytes()
        except OSError as error:
            raise file.error(line, f"image_path: {error}") from error
        pictures.append(_require_picture(file, line, data))
    return tuple(pictures)


def _decode(file: _File, line: int, row: Row) -> tuple[bytes, ...]:
    pictures = []
    for part in _split(row.get("image", "")):
        text = file.images.get(part, "") if len(part) <= REFERENCE else part
        if not text:
            raise file.error(line, f"image is {part!r}: neither base64 nor the index of a row with a picture")
        for encoded in _split(text):
            try:
                data = base64.b64decode("".join(encoded.split()), validate=True)
            except binascii.Error as error:
                raise file.error(line, f"image is no base64: {error}") from error
            pictures.append(_require_picture(file, line, data))
    return tuple(pictures)


def _split(cell: str) -> list[str]:
    """One, or several as Python writes a list of strings."""
    text = cell.strip()
    found = parse_list(text)
    if found is None:
        return [text] if text else []
    return [str(part) for part in found]


def _require_picture(file: _File, line: int, data: bytes) -> bytes:
    try:
        read_size(data)
    except UnreadableImage as error:
        raise file.error(line, f"image can't be read: {error}") from error
    return data
