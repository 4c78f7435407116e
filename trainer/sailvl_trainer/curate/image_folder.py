"""List image folders: images at any depth, with captions in NAME.txt, captions.jsonl or metadata.jsonl."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sailvl_trainer.curate.items import IMAGE_SUFFIXES, Item, clean_key, clean_text, get_suffix

CAPTION_FILES = frozenset({"captions.jsonl", "metadata.jsonl"})
"""Each line is an object: {"image" or "file_name": path relative to this file, "caption" or "text": the caption}."""


def list_image_folder(root: Path, source: str) -> Iterator[Item]:
    """Yield the images by path, then an item with a problem for each bad line and for each caption without an image."""
    files = sorted(_walk(root))
    captions: dict[str, str] = {}
    problems: list[Item] = []
    for name in files:
        if Path(name).name in CAPTION_FILES:
            _read_captions(root, name, source, captions, problems)
    images = [name for name in files if get_suffix(name) in IMAGE_SUFFIXES]
    texts = frozenset(name for name in files if name.endswith(".txt"))
    for name in images:
        text = f"{name.rsplit('.', 1)[0]}.txt"
        yield Item(
            source=source,
            key=clean_key(name.rsplit(".", 1)[0]),
            suffix=get_suffix(name),
            caption=captions.pop(name, None),
            caption_file=os.fsencode(root / text) if text in texts else b"",
            path=os.fsencode(root / name),
        )
    yield from problems
    for name in captions:
        detail = f"{clean_text(name)} has a caption but no image file"
        yield Item(source=source, key=clean_key(name), problem="missing", detail=detail)


def _walk(root: Path) -> Iterator[str]:
    """Yield the paths of all files relative to the root, without hidden ones and without folders that deny access.

    Raises OSError if a folder can't be listed for any other reason, because an outage would silently reduce the data.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unless_access_denied):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _raise_unless_access_denied(error: OSError) -> None:
    if error.errno not in (errno.EACCES, errno.EPERM):
        raise error


def _read_captions(root: Path, name: str, source: str, captions: dict[str, str], problems: list[Item]) -> None:
    """Add the records of a caption file to `captions`, by image path from the root, and its bad lines to `problems`."""
    prefix = name.rpartition("/")[0]
    with (root / name).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parse_record(line)
            if record is None:
                detail = f"{name}, line {number}: not an object with image and caption"
                problems.append(Item(source=source, key=clean_key(name), problem="bad_record", detail=detail))
            else:
                captions[os.path.normpath(f"{prefix}/{record[0]}".lstrip("/"))] = record[1]


def _parse_record(line: str) -> tuple[str, str] | None:
    """Return image name and caption of a line, or None if it is not a valid record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    name = record.get("image") or record.get("file_name")
    caption = record.get("caption") or record.get("text") or ""
    return (name, caption) if isinstance(name, str) and isinstance(caption, str) else None
