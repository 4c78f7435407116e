"""Raw data in an image folder: images at any depth, with their captions beside them. Called by sources.py.

The caption of an image is NAME.txt beside it, or a record of a caption file: each line is an object {"image" or
"file_name": path relative to the caption file, "caption" or "text": the caption}. Captions of text files are read
together with the image.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
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
)
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file

CAPTION_FILES = frozenset({"captions.jsonl", "metadata.jsonl"})
SKIPPED_FOLDER_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG})
"""Errors of a single folder, which is skipped. Others end the rank, or an outage would silently reduce the data."""


def list_image_folder(root: Path, source: str, roots: DataRoots) -> Iterator[Item]:
    """Yield the images by path, then an item with a problem for each bad line and for each caption without an image."""
    files = sorted(walk_folder(root))
    caption_files = [name for name in files if Path(name).name in CAPTION_FILES]
    images = [name for name in files if get_suffix(name) in IMAGE_SUFFIXES]
    texts = frozenset(name for name in files if name.endswith(".txt"))
    captions: dict[str, str | None] = dict.fromkeys(images)
    for name in caption_files:
        captions.update(_read_captions(root, name, roots, captions))
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
        yield from _iter_problems(root, name, roots, source, captions)


def walk_folder(root: Path) -> Iterator[str]:
    """Yield the paths of all files relative to the root, without hidden ones; links to folders are not followed.

    Folders that deny access are skipped. Raises OSError if a folder can't be listed for any other reason.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
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


def _read_captions(root: Path, name: str, roots: DataRoots, images: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield image path from the root and caption of each valid record whose image exists."""
    try:
        with open_data_file(root / name, roots) as file:
            for _, record in _iter_records(file, name):
                if record is not None and record[0] in images:
                    yield record[0], clean_caption(record[1])
    except (OSError, RefusedFileError) as error:
        classify_file_error(error)  # raises errors of the storage; _iter_problems counts the others


def _iter_problems(
    root: Path, name: str, roots: DataRoots, source: str, images: dict[str, str | None]
) -> Iterator[Item]:
    """Yield an item for each bad line of a caption file, for each record without an image, or for the whole file."""
    try:
        with open_data_file(root / name, roots) as file:
            for number, record in _iter_records(file, name):
                if record is None:
                    detail = f"{name}, line {number}: not an object with image and caption, or longer than 1 MiB"
                    yield build_problem_item(source, name, "bad_record", detail)
                elif record[0] not in images:
                    detail = f"{record[0][:100]} has a caption but no image file"
                    yield build_problem_item(source, record[0], "missing", detail)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        yield build_problem_item(source, name, outcome, f"{name}: {detail}")


def _iter_records(file: BinaryIO, name: str) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """Yield number and record of each line that isn't empty: image path from the root and caption, None if invalid."""
    prefix = name.rpartition("/")[0]
    for number, line in enumerate(iter_lines(file, MAX_TEXT_BYTES), start=1):
        text = "" if line is None else line.decode("utf-8", "replace")
        if line is None or text.strip():
            yield number, _parse_record(prefix, text)


def iter_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for a line with more than `max_bytes`, which is never in memory as a whole."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(max_bytes)
        yield None


def _parse_record(prefix: str, text: str) -> tuple[str, str] | None:
    record = parse_json_object(text)
    if record is None:
        return None
    name = record.get("image") or record.get("file_name")
    caption = record.get("caption") or record.get("text") or ""
    if not isinstance(name, str) or not isinstance(caption, str):
        return None
    return os.path.normpath(f"{prefix}/{name}".lstrip("/")), caption
