"""Read benchmarks in VLMEvalKit's format: a TSV with index, image, question, answer, and A, B, C, … for choices.

The size of the file, the number of its columns and the length of each cell are bounded, so that a file from the
internet can't exhaust the memory. Called by benchmark.py, and by report.py for the images.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import IO

from sailvl_trainer.data.image_structure import InvalidImage
from sailvl_trainer.data.images import read_size
from sailvl_trainer.errors import DataError
from sailvl_trainer.evaluate.cells import parse_list
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file, read_data_file
from sailvl_trainer.storage.files import translate_read_errors

REQUIRED_COLUMNS = ("index", "question", "answer")
KNOWN_COLUMNS = (*REQUIRED_COLUMNS, "image", "image_path", "hint")
READ_COLUMNS = frozenset({*KNOWN_COLUMNS, *ascii_uppercase})
IMAGE_COLUMNS = frozenset({"image", "image_path"})
EMPTY_CELLS = frozenset({"", "nan", "NaN"})
"""Cells without a value, also as pandas writes them."""
MAX_REFERENCE_LENGTH = 64
"""An image cell with at most so many characters is the index of the row that holds the image."""
MAX_FILE_BYTES = 8 << 30
"""Largest size of a benchmark's file."""
MAX_COLUMNS = 256
MAX_CELL_LENGTH = 1 << 28
"""Largest number of characters of a cell; only images need so many."""
MAX_TEXT_LENGTH = 1 << 16
"""Largest number of characters of a question, an answer, a choice or a hint."""
MAX_LINE_LENGTH = MAX_CELL_LENGTH + (1 << 24)
MAX_IMAGES = 64
"""Largest number of images of a question."""
MAX_IMAGE_BYTES = 256 << 20
"""Largest size of a file named by `image_path`."""

csv.field_size_limit(MAX_CELL_LENGTH)

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
    roots: DataRoots
    """Directories that images named by `image_path` may be in."""
    cells: dict[str, str]
    """Image cell of each row by its index."""
    decoded: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Images of the rows that others refer to, by index, so that all questions share them."""

    def build_error(self, row_number: int, message: str) -> DataError:
        return DataError(f"benchmark {self.path}, row {row_number}: {message}")


def read_tsv(path: Path, limit: int = 0, *, storage: Path | None = None) -> list[Question]:
    """Return all questions, or the first `limit` of them.

    Column `image` holds base64, the index of a row that holds the image, or a Python list of these. If it is empty,
    column `image_path` may hold a path relative to the TSV's folder; the file must be below that folder or below
    `storage`. Raises DataError with the number of the row, where row 1 is the header.
    """
    rows = _read_rows(path)
    roots = DataRoots.resolve(path.parent, *(() if storage is None else (storage,)))
    file = _BenchmarkFile(path=path, roots=roots, cells={row["index"]: row.get("image", "") for row in rows})
    if len(file.cells) < len(rows):
        duplicate, _ = Counter(row["index"] for row in rows).most_common(1)[0]
        raise DataError(f"benchmark {path}: duplicate index {duplicate}; give each row a unique index")
    return [_parse_question(file, number, row) for number, row in enumerate(rows[:limit] if limit else rows, 2)]


def _read_rows(path: Path) -> list[Row]:
    """Return the cells of all rows that have a value, by column."""
    try:
        with translate_read_errors(path), _open_text(path) as file:
            reader = csv.reader(_iterate_lines(path, file), delimiter="\t", strict=True)
            columns = next(reader, [])
            _check_columns(path, columns)
            rows = [_build_row(path, number, columns, cells) for number, cells in enumerate(filter(None, reader), 2)]
    except (OSError, UnicodeDecodeError, RefusedFileError, csv.Error) as error:
        raise DataError(f"benchmark {path}: {error}; the file must be a TSV in UTF-8") from error
    if not rows:
        raise DataError(f"benchmark {path} contains no questions")
    return rows


def _open_text(path: Path) -> IO[str]:
    """Open the file, which may be a link to one elsewhere. Raises OSError or RefusedFileError."""
    file = open_data_file(path, DataRoots.resolve(path))
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        file.close()
        raise RefusedFileError("too_large", f"{size} bytes; split it into files of at most {MAX_FILE_BYTES} bytes")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _iterate_lines(path: Path, file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file. Raises DataError for a line that is too long to hold a row."""
    while line := file.readline(MAX_LINE_LENGTH):
        if len(line) == MAX_LINE_LENGTH:
            raise DataError(f"benchmark {path} has a line of more than {MAX_LINE_LENGTH} characters; split its images")
        yield line


def _check_columns(path: Path, columns: list[str]) -> None:
    if len(columns) > MAX_COLUMNS:
        raise DataError(f"benchmark {path} has {len(columns)} columns; remove all but {MAX_COLUMNS}")
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        found = ", ".join(columns)[:200] or "none"
        raise DataError(f"benchmark {path}: missing column {', '.join(missing)}; found {found}")
    for name in columns:
        if name not in KNOWN_COLUMNS and name.strip().lower() in KNOWN_COLUMNS:
            raise DataError(f"benchmark {path}: unknown column {name!r}; rename it to {name.strip().lower()}")


def _build_row(path: Path, number: int, columns: list[str], cells: list[str]) -> Row:
    """Return a row's cells of the columns that are read, without empty ones; `index` is always there."""
    if len(cells) > len(columns):
        raise DataError(f"benchmark {path}, row {number}: more cells than the header; quote cells that contain tabs")
    row = {"index": ""}
    for name, cell in zip(columns, cells, strict=False):
        if name not in READ_COLUMNS or cell.strip() in EMPTY_CELLS:
            continue
        if name not in IMAGE_COLUMNS and len(cell) > MAX_TEXT_LENGTH:
            raise DataError(
                f"benchmark {path}, row {number}: {name} has {len(cell)} characters; shorten it to {MAX_TEXT_LENGTH}"
            )
        row[name] = cell
    return row


def _parse_question(file: _BenchmarkFile, row_number: int, row: Row) -> Question:
    empty = [name for name in REQUIRED_COLUMNS if not row.get(name, "").strip()]
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
    """Return the encoded images of a row. Raises DataError if one can't be read, or if there are too many."""
    if "image" in row:
        images = _decode_images(file, row_number, row["image"])
    else:
        images = _read_image_files(file, row_number, row.get("image_path", ""))
    if len(images) > MAX_IMAGES:
        raise file.build_error(row_number, f"more than {MAX_IMAGES} images; remove some")
    for image in images:
        try:
            read_size(image)
        except InvalidImage as error:
            raise file.build_error(row_number, f"{error}; replace the image") from error
    return images


def _read_image_files(file: _BenchmarkFile, row_number: int, cell: str) -> tuple[bytes, ...]:
    paths = [file.path.parent / name for name in _parse_cell(cell)[: MAX_IMAGES + 1]]
    try:
        with translate_read_errors(file.path):
            return tuple(read_data_file(path, file.roots, max_bytes=MAX_IMAGE_BYTES) for path in paths)
    except (OSError, RefusedFileError) as error:
        raise file.build_error(row_number, f"image_path: {error}") from error


def _decode_images(file: _BenchmarkFile, row_number: int, cell: str) -> tuple[bytes, ...]:
    """Return the images of a cell, at most one more than a question may have."""
    images: list[bytes] = []
    for value in _parse_cell(cell):
        if len(value) > MAX_REFERENCE_LENGTH:
            images.append(_decode_base64(file, row_number, value))
        else:
            images.extend(_decode_referenced(file, row_number, value))
        if len(images) > MAX_IMAGES:
            break
    return tuple(images)


def _decode_referenced(file: _BenchmarkFile, row_number: int, index: str) -> tuple[bytes, ...]:
    """Return the images in the cell of another row, which can't refer to a third one."""
    if index not in file.decoded:
        text = file.cells.get(index, "")
        if not text:
            raise file.build_error(
                row_number, f"image {index!r} is neither base64 nor the index of a row with an image"
            )
        values = _parse_cell(text)[: MAX_IMAGES + 1]
        file.decoded[index] = tuple(_decode_base64(file, row_number, value) for value in values)
    return file.decoded[index]


def _decode_base64(file: _BenchmarkFile, row_number: int, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: a character that isn't ASCII
        raise file.build_error(row_number, f"image is not valid base64: {error}") from error


def _parse_cell(cell: str) -> list[str]:
    """Return the values of a cell that holds one string or a Python list of strings."""
    text = cell.strip()
    values = parse_list(text)
    if values is None:
        return [text] if text else []
    return [str(value) for value in values]
