"""The unit of curation: one raw image, where its bytes are, and its caption.

Items are created by sources.py, stored in Parquet files, and read by verify.py, stage.py and report.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailvl_trainer.data.synthetic import draw_caption

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_TEXT_BYTES = 1 << 20
"""Number of bytes that are read of a caption file."""
MAX_KEY_LENGTH = 64
"""Characters of a key. A name in a plain tar has at most 100, which include the item's number and a suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePartition:
    """A part of a source that one rank lists: an image folder, a tar, or a set of synthetic images."""

    source: str
    format: Literal["imagefolder", "webdataset", "procedural"]
    path: str
    samples: int = 0
    """Maximum number of items of the whole source; 0: no limit."""
    seed: int = 0
    level: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One raw image. The fields are columns of Parquet files, so their types are plain."""

    source: str
    key: str
    suffix: str = ""
    caption: str | None = None
    caption_file: bytes = b""
    """Path of the file with the caption, if `caption` is None; it is read together with the image."""
    path: bytes = b""
    """Path of the image file or of its tar, as bytes, because a file name need not be valid UTF-8."""
    offset: int = 0
    size: int = -1
    """Number of bytes of the image from `offset`; -1: to the end of the file."""
    index: int = -1
    """Number of a synthetic sample, which is drawn from `seed` and `level`; -1: the image is in a file."""
    seed: int = 0
    level: int = 1
    problem: str = ""
    """Outcome of an item that can't be read: missing, bad_record or broken_tar; empty for a readable one."""
    detail: str = ""
    """Description of the problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemContent:
    """The encoded image and the raw caption of an item."""

    image: bytes
    caption: str


def read_item(item: Item) -> ItemContent:
    """Read an item from its files, or draw it if it is synthetic. Raises OSError."""
    if item.index >= 0:
        sample = draw_caption(item.seed, item.index, item.level)
        assert sample.image is not None, "every synthetic sample has an image"
        return ItemContent(image=sample.image, caption=str(sample.meta["caption"]))
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        image = file.read(item.size)
    if item.caption is None and item.caption_file:
        with open(item.caption_file, "rb") as file:
            return ItemContent(image=image, caption=file.read(MAX_TEXT_BYTES).decode("utf-8", "replace"))
    return ItemContent(image=image, caption=item.caption or "")


def clean_key(name: str) -> str:
    """Replace dots, at which WebDataset splits names, slashes and other special characters by dashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-MAX_KEY_LENGTH:]


def get_suffix(name: str) -> str:
    """Return the last suffix of a file name in lower case, without its dot."""
    return Path(name).suffix.lower().removeprefix(".")


def clean_text(text: str) -> str:
    """Make text encodable as UTF-8: lone surrogates (from JSON escapes or file names) become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
