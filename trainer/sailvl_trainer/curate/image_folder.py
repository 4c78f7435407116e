"""Raw data in an image folder: images at any depth, with their captions beside them. Called by sources.py.

The caption of an image is NAME.txt beside it, or a record of a caption file: each line is an object {"image" or
"file_name": path relative to the caption file, "caption" or "text": the caption}. Captions of text files are read
together with the image.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from sailvl_trainer.curate.captions import MAX_TEXT_BYTES, clean_caption, parse_json_object
from sailvl_trainer.curate.items import (
    IMAGE_SUFFIXES,
    Item,
    build_problem_item,
    classify_file_error,
    clean_key,
    get_suffix,
    ignore_progress,
)
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file
from sailvl_trainer.storage.files import format_bytes

CAPTION_FILES = frozenset({"captions.jsonl", "metadata.jsonl"})
MAX_CAPTION_FILE_BYTES = 16 << 30
"""Maximum size of a caption file; a larger one isn't read."""
MAX_SKIPPED_BYTES = 64 << 20
"""Length of a line at which a caption file isn't read further; lines above MAX_TEXT_BYTES are skipped."""
SKIPPED_FOLDER_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG})
"""Errors of a single folder, which is skipped. Others end the rank, or an outage would silently reduce the data."""


def list_image_folder(
    root: Path, source: str, roots: DataRoots, on_progress: Callable[[], None] = ignore_progress
) -> Iterator[Item]:
    """Yield the images by path, then an item with a problem for each bad line and for each caption without an image.

    `on_progress` is called for each file, each line, and each chunk of a long line.
    """
    files = sorted(walk_folder(root, on_progress))
    caption_files = [name for name in files if Path(name).name in CAPTION_FILES]
    images = [name for name in files if get_suffix(name) in IMAGE_SUFFIXES]
    texts = frozenset(name for name in files if name.endswith(".txt"))
    captions: dict[str, str | None] = dict.fromkeys(images)
    for name in caption_files:
        captions.update(_read_captions(_CaptionFile(root, name, roots, on_progress), captions))
    for name in images:
        text = f"{name.rsplit('.', 1)[0]}.txt"
        yield Item(
            source=source,
            key=clean_key(name.rsplit(".", 1)[0]),
            suffix=get_suffix(name),
            caption=captions[name],
            caption_file=os.fsencode(root / text) if text in texts else b"",
            path=os.fsencode(root / name),
        )
    for name in caption_files:  # read again, because the problems of a large file would not fit into memory
        yield from _iter_problems(_CaptionFile(root, name, roots, on_progress), source, captions)


def walk_folder(root: Path, on_progress: Callable[[], None] = ignore_progress) -> Iterator[str]:
    """Yield the paths of all files relative to the root, without hidden ones; links to folders are not followed.

    Folders that deny access are skipped. `on_progress` is called for each entry. Raises OSError if a folder can't be
    listed for any other reason.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = sorted(_scan_folder(root / prefix, on_progress), key=lambda entry: entry.name)
        except OSError as error:
            if error.errno not in SKIPPED_FOLDER_ERRORS:
                raise
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}"


def _scan_folder(path: Path, on_progress: Callable[[], None]) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        for entry in entries:
            on_progress()
            yield entry


@dataclass(frozen=True, slots=True)
class _CaptionFile:
    """A caption file below the root of a source."""

    root: Path
    name: str
    roots: DataRoots
    on_progress: Callable[[], None]

    def iter_records(self) -> Iterator[tuple[int, tuple[str, str] | None]]:
        """Yield number and record of each line that isn't empty: image path from the root and caption, None if invalid.

        Raises OSError, or RefusedFileError for a file that isn't read, or not to its end.
        """
        prefix = self.name.rpartition("/")[0]
        with open_data_file(self.root / self.name, self.roots) as file:
            if os.fstat(file.fileno()).st_size > MAX_CAPTION_FILE_BYTES:
                raise _build_size_error()
            for number, line in enumerate(iter_lines(file, MAX_TEXT_BYTES, self.on_progress), start=1):
                text = "" if line is None else line.decode("utf-8", "replace")
                if line is None or text.strip():
                    yield number, _parse_record(prefix, text)


def _read_captions(file: _CaptionFile, images: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield image path from the root and caption of each valid record whose image exists."""
    try:
        for _, record in file.iter_records():
            if record is not None and record[0] in images:
                yield record[0], clean_caption(record[1])
    except (OSError, RefusedFileError) as error:
        classify_file_error(error)  # raises errors of the storage; _iter_problems counts the others


def _iter_problems(file: _CaptionFile, source: str, images: dict[str, str | None]) -> Iterator[Item]:
    """Yield an item for each bad line of a caption file, for each record without an image, or for the whole file."""
    name = file.name
    try:
        for number, record in file.iter_records():
            if record is None:
                detail = f"{name}, line {number}: not an object with image and caption, or longer than 1 MiB"
                yield build_problem_item(source, name, "invalid_record", detail)
            elif record[0] not in images:
                detail = f"{record[0][:100]} has a caption but no image file"
                yield build_problem_item(source, record[0], "missing", detail)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        yield build_problem_item(source, name, outcome, f"{name}: {detail}")


def iter_lines(
    file: BinaryIO, max_bytes: int, on_progress: Callable[[], None] = ignore_progress
) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for a line with more than `max_bytes`, which is never in memory as a whole.

    `on_progress` is called for each line, and for each `max_bytes` of a longer one. Raises RefusedFileError at a line
    above MAX_SKIPPED_BYTES, and if a growing file exceeds MAX_CAPTION_FILE_BYTES.
    """
    total = 0
    for number in count(1):
        line = file.readline(max_bytes + 1)
        if not line:
            return
        on_progress()
        is_long = len(line) > max_bytes and not line.endswith(b"\n")
        total += len(line) + (_skip_line(file, number, max_bytes, on_progress) if is_long else 0)
        if total > MAX_CAPTION_FILE_BYTES:
            raise _build_size_error()
        yield None if is_long else line


def _skip_line(file: BinaryIO, number: int, chunk_bytes: int, on_progress: Callable[[], None]) -> int:
    """Read to the end of a line in chunks and return how many bytes that were."""
    length = 0
    while line := file.readline(chunk_bytes):
        on_progress()
        length += len(line)
        if length > MAX_SKIPPED_BYTES:
            detail = f"line {number} is longer than {format_bytes(MAX_SKIPPED_BYTES)}; the rest is not read"
            raise RefusedFileError("too_large", detail)
        if line.endswith(b"\n"):
            break
    return length


def _build_size_error() -> RefusedFileError:
    return RefusedFileError("too_large", f"larger than {format_bytes(MAX_CAPTION_FILE_BYTES)}; divide it")


def _parse_record(prefix: str, text: str) -> tuple[str, str] | None:
    record = parse_json_object(text)
    if record is None:
        return None
    name = record.get("image") or record.get("file_name")
    caption = record.get("caption") or record.get("text") or ""
    if not isinstance(name, str) or not isinstance(caption, str):
        return None
    return os.path.normpath(f"{prefix}/{name}".lstrip("/")), caption
