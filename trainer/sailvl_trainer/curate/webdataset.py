"""Raw data in WebDataset tars: adjacent files of one key are a sample. Called by sources.py.

The caption of a sample is KEY.txt, or "caption" in KEY.json. Images stay in the tar; only captions are read. A file
that looks like an image or a caption and isn't used is counted with its name and the reason, whatever is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sailvl_trainer.curate.captions import MAX_TEXT_BYTES, clean_caption, parse_json_object
from sailvl_trainer.curate.items import (
    IMAGE_SUFFIXES,
    Item,
    build_problem_item,
    classify_file_error,
    clean_key,
    ignore_progress,
)
from sailvl_trainer.curate.tar_members import InvalidTarError, TarMember, iter_tar_members
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file
from sailvl_trainer.storage.files import format_bytes

CAPTION_SUFFIXES = frozenset({"txt", "json"})


class _CaptionError(ValueError):
    """The caption of a sample can't be read; the message begins with the name of its file."""


@dataclass(kw_only=True, slots=True)
class TarGroup:
    """Members of one key that curation reads."""

    key: str
    image: TarMember | None = None
    image_suffix: str = ""
    """Suffix of the first image, which may contain dots."""
    text: TarMember | None = None
    json: TarMember | None = None
    is_counted: bool = False
    """Whether an unusable image of this key was counted, so that the absence of an image isn't counted too."""

    def add(self, suffix: str, member: TarMember) -> str:
        """Add a member with its suffix in lower case; return what is wrong with it or with the one that it replaces."""
        if not _is_image(suffix) and suffix not in CAPTION_SUFFIXES:
            return ""
        if member.problem:
            self.is_counted |= _is_image(suffix)
            return member.problem
        if suffix == "txt":
            replaced, self.text = self.text, member
        elif suffix == "json":
            replaced, self.json = self.json, member
        elif self.image_suffix not in ("", suffix):
            return f"its key has an image .{self.image_suffix[:20]} already, and one is read"
        else:
            replaced, self.image, self.image_suffix = self.image, member, suffix
        return "" if replaced is None else "its key has two files with this name; the last one is read"


def list_tar(
    path: Path, source: str, roots: DataRoots, on_progress: Callable[[], None] = ignore_progress
) -> Iterator[Item]:
    """Yield one item per key with an image, and one with a problem for each file that isn't used.

    A broken tar yields its complete items, then an item with the problem. `on_progress` is called for each member.
    """
    try:
        with open_data_file(path, roots) as file:
            for found in _iter_groups(file, path, source, on_progress):
                if isinstance(found, Item):
                    yield found
                elif (item := _build_item(path, source, found, file)) is not None:
                    yield item
    except InvalidTarError as error:
        detail = f"{path.name} is truncated, damaged, or not an uncompressed tar: {error}"
        yield build_problem_item(source, path.stem, "invalid_tar", detail)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        yield build_problem_item(source, path.stem, outcome, f"{path.name}: {detail}")


def _iter_groups(file: BinaryIO, path: Path, source: str, on_progress: Callable[[], None]) -> Iterator[TarGroup | Item]:
    """Yield the groups of adjacent files with one key, and an item for each file that isn't used.

    As in WebDataset, a key ends at a file name's first dot. Hidden files are skipped: macOS writes a file `._NAME` with
    attributes before each file, between the files of a key. Raises InvalidTarError after the last group.
    """
    group = TarGroup(key="")
    try:
        for member in iter_tar_members(file, on_progress):
            folder, _, name = member.name.rpartition("/")
            if name.startswith("."):
                continue
            stem, _, suffix = name.partition(".")
            if group.key != f"{folder}/{stem}":
                yield group
                group = TarGroup(key=f"{folder}/{stem}")
            if problem := group.add(suffix.lower(), member):
                outcome = "irregular_file" if member.problem else "invalid_record"
                detail = f"{path.name}: {member.name[-100:]}: {problem}"
                yield build_problem_item(source, _build_name(path, group), outcome, detail)
    except InvalidTarError:
        yield group
        raise
    yield group


def _build_item(path: Path, source: str, group: TarGroup, file: BinaryIO) -> Item | None:
    """Return the item of a group; None if it has no image, and no caption that is lost with it."""
    name = _build_name(path, group)
    if group.image is None:
        if group.is_counted or (group.text is None and group.json is None):
            return None
        key = group.key.removeprefix("/")[-100:]
        detail = f"{path.name}: {key} has a caption but no image; write the files of a key in succession"
        return build_problem_item(source, name, "missing", detail)
    try:
        caption = _read_caption(group, file)
    except _CaptionError as error:
        return build_problem_item(source, name, "invalid_record", f"{path.name}: {error}")
    return Item(
        source=source,
        key=clean_key(name),
        suffix=group.image_suffix.rpartition(".")[2],
        caption=caption,
        path=os.fsencode(path),
        offset=group.image.offset,
        size=group.image.size,
    )


def _read_caption(group: TarGroup, file: BinaryIO) -> str | None:
    """Return the caption of a group, None without one. Raises _CaptionError for JSON that isn't read."""
    member = group.text or group.json
    if member is None:
        return None
    if member is group.json and member.size > MAX_TEXT_BYTES:
        raise _CaptionError(f"{member.name[-100:]} is larger than {format_bytes(MAX_TEXT_BYTES)}")
    file.seek(member.offset)
    text = file.read(min(member.size, MAX_TEXT_BYTES)).decode("utf-8", "replace")
    if member is group.text:
        return clean_caption(text)
    record = parse_json_object(text)
    if record is None:
        raise _CaptionError(f"{member.name[-100:]} is not a JSON object")
    caption = record.get("caption")
    return clean_caption(caption) if isinstance(caption, str) else None


def _build_name(path: Path, group: TarGroup) -> str:
    return f"{path.stem}-{group.key.removeprefix('./')}"


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES
