"""Read benchmarks in VLMEvalKit's format: a TSV with index, image, question, answer, and A, B, C, … for choices.

Called by benchmark.py, and by report.py for the images.
"""

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
REQUIRED_COLUMNS = ("index", "question", "answer")
KNOWN_COLUMNS = (*REQUIRED_COLUMNS, "image", "image_path", "hint")
EMPTY_CELLS = frozenset({"", "nan", "NaN"})
"""Cells without a value, also as pandas writes them."""
MAX_REFERENCE_LENGTH = 64
"""An image cell with at most so many characters is the index of the row that holds the image."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row of a benchmark."""

    index: str
    images: tuple[bytes, ...]
    """Encoded images; the prompt has all of them before the question."""
    question: str
    answer: str
    choices: dict[str, str] = field(default_factory=dict)
    """Text of each choice by its letter."""
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _BenchmarkFile:
    """A TSV whose rows are being parsed."""

    path: Path
    images: Mapping[str, str]
    """Image cell of each row by its index."""

    def build_error(self, row_number: int, message: str) -> DataError:
        return DataError(f"benchmark {self.path}, row {row_number}: {message}")


def read_tsv(path: Path, limit: int = 0) -> list[Question]:
    """Return all questions, or the first `limit` of them.

    Column `image` holds base64, the index of a row that holds the image, or a Python list of these. If it is empty,
    column `image_path` may hold a path relative to the TSV's folder. Raises DataError with the number of the row, where
    row 1 is the header.
    """
    rows = [
        {name: "" if cell.strip() in EMPTY_CELLS else cell for name, cell in row.items()} for row in _read_rows(path)
    ]
    file = _BenchmarkFile(path=path, images={row["index"]: row.get("image", "") for row in rows})
    if len(file.images) < len(rows):
        duplicate, _ = Counter(row["index"] for row in rows).most_common(1)[0]
        raise DataError(f"benchmark {path}: duplicate index {duplicate}; give each row a unique index")
    return [_parse_question(file, number, row) for number, row in enumerate(rows[:limit] if limit else rows, 2)]


def parse_list(text: str) -> list[object] | None:
    """Parse a Python list; return None for any other text."""
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
        raise DataError(f"benchmark {path}: {error}; the file must be a TSV in UTF-8") from error
    columns = reader.fieldnames or []
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise DataError(f"benchmark {path}: missing column {', '.join(missing)}; found {', '.join(columns) or 'none'}")
    for name in columns:
        if name not in KNOWN_COLUMNS and name.strip().lower() in KNOWN_COLUMNS:
            raise DataError(f"benchmark {path}: unknown column {name!r}; rename it to {name.strip().lower()}")
    if not rows:
        raise DataError(f"benchmark {path} contains no questions")
    for number, row in enumerate(rows, 2):
        if None in row:
            raise DataError(
                f"benchmark {path}, row {number}: more cells than the header; quote cells that contain tabs"
            )
    return rows


def _parse_question(file: _BenchmarkFile, row_number: int, row: Row) -> Question:
    empty = [name for name in REQUIRED_COLUMNS if not row[name].strip()]
    if empty:
        raise file.build_error(row_number, f"{', '.join(empty)} is empty; remove rows that can't be scored")
    return Question(
        index=row["index"],
        images=_read_images(file, row_number, row),
        question=row["question"],
        answer=row["answer"],
        choices={letter: text for letter in ascii_uppercase if (text := row.get(letter, ""))},
        hint=row.get("hint", ""),
    )


def _read_images(file: _BenchmarkFile, row_number: int, row: Row) -> tuple[bytes, ...]:
    """Return the encoded images of a row. Raises DataError if one can't be read."""
    if row.get("image"):
        images = _decode_images(file, row_number, row["image"])
    else:
        images = _read_image_files(file, row_number, row.get("image_path", ""))
    for image in images:
        try:
            read_size(image)
        except UnreadableImage as error:
            raise file.build_error(row_number, f"{error}; replace the image") from error
    return images


def _read_image_files(file: _BenchmarkFile, row_number: int, cell: str) -> tuple[bytes, ...]:
    try:
        return tuple((file.path.parent / name).read_bytes() for name in _parse_cell(cell))
    except OSError as error:
        raise file.build_error(row_number, f"image_path: {error}") from error


def _decode_images(file: _BenchmarkFile, row_number: int, cell: str) -> tuple[bytes, ...]:
    images = []
    for value in _parse_cell(cell):
        text = file.images.get(value, "") if len(value) <= MAX_REFERENCE_LENGTH else value
        if not text:
            raise file.build_error(
                row_number, f"image {value!r} is neither base64 nor the index of a row with an image"
            )
        for encoded in _parse_cell(text):
            try:
                images.append(base64.b64decode("".join(encoded.split()), validate=True))
            except binascii.Error as error:
                raise file.build_error(row_number, f"image is not valid base64: {error}") from error
    return tuple(images)


def _parse_cell(cell: str) -> list[str]:
    """Return the values of a cell that holds one string or a Python list of strings."""
    text = cell.strip()
    values = parse_list(text)
    if values is None:
        return [text] if text else []
    return [str(value) for value in values]
