"""Raw data in WebDataset tars: adjacent files of one key are a sample. Called by sources.py.

The caption of a sample is KEY.txt, or "caption" in KEY.json. Images stay in the tar; only captions are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sailvl_trainer.curate.captions import MAX_TEXT_BYTES, clean_caption, parse_json_object
from sailvl_trainer.curate.items import IMAGE_SUFFIXES, Item, build_problem_item, classify_file_error, clean_key
from sailvl_trainer.curate.tar_members import BrokenTarError, TarMember, iter_tar_members
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file


@dataclass(kw_only=True, slots=True)
class TarGroup:
    """Members of one key that curation reads; of further ones, only the last with an equal name counts."""

    key: str
    image: TarMember | None = None
    image_suffix: str = ""
    """Suffix of the first image, which may contain dots."""
    text: TarMember | None = None
    json: TarMember | None = None

    def add(self, suffix: str, member: TarMember) -> None:
        """Add a member with its suffix in lower case."""
        if suffix == "txt":
            self.text = member
        elif suffix == "json":
            self.json = member
        elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES and self.image_suffix in ("", suffix):
            self.image, self.image_suffix = member, suffix


def list_tar(path: Path, source: str, roots: DataRoots) -> Iterator[Item]:
    """Yield one item per key with an image; a broken tar yields its complete items, then an item with the problem."""
    try:
        with open_data_file(path, roots) as file:
            for group in _iter_groups(file):
                if group.image is not None:
                    yield _build_item(path, source, group, group.image, file)
    except BrokenTarError as error:
        detail = f"{path.name} is truncated, damaged, or not an uncompressed tar: {error}"
        yield build_problem_item(source, path.stem, "broken_tar", detail)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        yield build_problem_item(source, path.stem, outcome, f"{path.name}: {detail}")


def _iter_groups(file: BinaryIO) -> Iterator[TarGroup]:
    """Yield the groups of adjacent files with one key. As in WebDataset, a key ends at a file name's first dot.

    Hidden files are skipped: macOS writes a file `._NAME` with attributes before each file, between the files of a key.
    Raises BrokenTarError after the last group.
    """
    group = TarGroup(key="")
    try:
        for member in iter_tar_members(file):
            folder, _, name = member.name.rpartition("/")
            if name.startswith("."):
                continue
            stem, _, suffix = name.partition(".")
            if group.key != f"{folder}/{stem}":
                yield group
                group = TarGroup(key=f"{folder}/{stem}")
            group.add(suffix.lower(), member)
    except BrokenTarError:
        yield group
        raise
    yield group


def _build_item(path: Path, source: str, group: TarGroup, image: TarMember, file: BinaryIO) -> Item:
    return Item(
        source=source,
        key=clean_key(f"{path.stem}-{group.key.removeprefix('./')}"),
        suffix=group.image_suffix.rpartition(".")[2],
        caption=_read_caption(group, file),
        path=os.fsencode(path),
        offset=image.offset,
        size=image.size,
    )


def _read_caption(group: TarGroup, file: BinaryIO) -> str | None:
    member = group.text or group.json
    if member is None:
        return None
    file.seek(member.offset)
    text = file.read(min(member.size, MAX_TEXT_BYTES)).decode("utf-8", "replace")
    if group.text is not None:
        return clean_caption(text)
    caption = (parse_json_object(text) or {}).get("caption")
    return clean_caption(caption) if isinstance(caption, str) else None
