"""Image folders: pictures with NAME.txt beside them, or named by captions.jsonl or metadata.jsonl, at any depth."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.curate.items import SUFFIXES, Item, clean_key, clean_text, suffix_of

CAPTION_FILES = frozenset({"captions.jsonl", "metadata.jsonl"})
"""A line: {"image" or "file_name": path from the file's folder, "caption" or "text": words}."""


def list_folder(root: Path, source: str) -> Iterator[Item]:
    """Pictures by path, then records of caption files that name no picture or are no record."""
    files = sorted(_walk(root))
    captions: dict[str, str] = {}
    problems: list[Item] = []
    for name in files:
        if Path(name).name in CAPTION_FILES:
            _read_captions(root, name, source, captions, problems)
    pictures = [name for name in files if suffix_of(name) in SUFFIXES]
    texts = frozenset(name for name in files if name.endswith(".txt"))
    for name in pictures:
        beside = f"{name.rsplit('.', 1)[0]}.txt"
        yield Item(
            source=source,
            key=clean_key(name.rsplit(".", 1)[0]),
            suffix=suffix_of(name),
            caption=captions.pop(name, None),
            caption_file=os.fsencode(root / beside) if beside in texts else b"",
            path=os.fsencode(root / name),
        )
    yield from problems
    for name in captions:
        words = f"{clean_text(name)} has a caption and no file"
        yield Item(source=source, key=clean_key(name), problem="missing", detail=words)


def _walk(root: Path) -> Iterator[str]:
    """Paths of all files, from the root; hidden ones are nobody's data, nor are folders that are closed to us.

    Raises OSError for a folder that can't be listed: an outage would quietly thin the data.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unless_closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _raise_unless_closed(error: OSError) -> None:
    if error.errno not in (errno.EACCES, errno.EPERM):
        raise error


def _read_captions(root: Path, name: str, source: str, captions: dict[str, str], problems: list[Item]) -> None:
    """Add a caption file's records to `captions`, by path from the root, and its bad lines to `problems`."""
    prefix = name.rpartition("/")[0]
    with (root / name).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parse(line)
            if record is None:
                words = f"{name}, line {number}: not an object with image and caption"
                problems.append(Item(source=source, key=clean_key(name), problem="bad_record", detail=words))
            else:
                captions[os.path.normpath(f"{prefix}/{record[0]}".lstrip("/"))] = record[1]


def _parse(line: str) -> tuple[str, str] | None:
    """File name and caption."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    name = record.get("image") or record.get("file_name")
    caption = record.get("caption") or record.get("text") or ""
    return (name, caption) if isinstance(name, str) and isinstance(caption, str) else None
