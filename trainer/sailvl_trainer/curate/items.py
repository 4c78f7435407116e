"""What curation works on: one raw picture and where its bytes are. Made by the listers, kept in Parquet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailvl_trainer.data.synthetic import draw_caption

SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_TEXT = 1 << 20
"""Bytes of a caption's file that are read."""
KEY_LENGTH = 64
"""Characters; a plain tar's names have at most 100, our number and a suffix among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A part of a source that is listed by one rank: an image folder, a tar, a procedural source."""

    source: str
    format: Literal["imagefolder", "webdataset", "procedural"]
    path: str
    samples: int = 0
    """At most so many items of the source; 0: all."""
    seed: int = 0
    level: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One raw picture; the fields are columns of Parquet files, so they are plain."""

    source: str
    key: str
    suffix: str = ""
    caption: str | None = None
    caption_file: bytes = b""
    """Where the caption is, if it isn't here: read with the picture, by the rank that verifies it."""
    path: bytes = b""
    """Of the file; as bytes, because a file's name need not be UTF-8."""
    offset: int = 0
    size: int = -1
    """Bytes from offset; -1: the whole file."""
    index: int = -1
    """procedural: number of the sample, which is drawn from seed and level."""
    seed: int = 0
    level: int = 1
    problem: str = ""
    """Outcome of an item that can't be read at all: missing, bad_record, broken_tar."""
    detail: str = ""
    """The problem in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """An item's bytes and caption."""

    data: bytes
    caption: str


def read_item(item: Item) -> Raw:
    """Raises OSError."""
    if item.index >= 0:
        sample = draw_caption(item.seed, item.index, item.level)
        assert sample.image is not None, "every drawn sample has a picture"
        return Raw(data=sample.image, caption=str(sample.meta["caption"]))
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        data = file.read(item.size)
    if item.caption is None and item.caption_file:
        with open(item.caption_file, "rb") as file:
            return Raw(data=data, caption=file.read(MAX_TEXT).decode("utf-8", "replace"))
    return Raw(data=data, caption=item.caption or "")


def clean_key(name: str) -> str:
    """WebDataset splits keys at dots and folders at slashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-KEY_LENGTH:]


def suffix_of(name: str) -> str:
    """The last suffix, in small letters, without its dot."""
    return Path(name).suffix.lower().removeprefix(".")


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates (from JSON escapes, odd file names) become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
