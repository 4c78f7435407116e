"""The unit of curation: one raw image, where its bytes are, and its caption.

Items are created by sources.py, stored in Parquet files, and read by verify.py, stage.py and report.py. The files of a
source are untrusted: `read_item` opens only regular files below the sources and the storage.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailvl_trainer.curate.captions import MAX_TEXT_BYTES, clean_text
from sailvl_trainer.data.image_memory import FILE_MEMORY
from sailvl_trainer.data.synthetic import draw_caption
from sailvl_trainer.storage.data_files import DataRoots, Reason, RefusedFileError, open_data_file, read_part
from sailvl_trainer.storage.files import FILE_ERRNOS, format_bytes

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_FILE_BYTES = 256 << 20
"""Larger encoded images are dropped unread."""
MAX_KEY_LENGTH = 64
"""Characters of a key. A name in a plain tar has at most 100, which include the item's number and a suffix."""
MAX_DETAIL_LENGTH = 400
"""Characters of a description of a problem."""
FILE_ERRORS = FILE_ERRNOS | {errno.EACCES, errno.EPERM}
"""Errors of a single file of a source, which is counted as missing. Any other read error is a failure of the storage
and ends the rank, because an outage would silently reduce the data."""
REFUSED_OUTCOMES: dict[Reason, str] = {
    "irregular_file": "irregular_file",
    "outside_root": "outside_source",
    "too_large": "too_large",
    "invalid_name": "missing",
}
"""Outcome of an item whose file is refused, by the reason."""

OUTSIDE_ADVICE = (
    "copy it into the source or below the storage; for a snapshot in the cache of Hugging Face, whose files are links "
    "to blobs/, set the source to the repository's folder in the cache, or use `huggingface-cli download --local-dir`"
)
"""Advice for a file of a source that leads out of it."""


def ignore_progress() -> None:
    """Do nothing; the default where a caller may pass a function that is called again and again during long reading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePartition:
    """A part of a source that one rank lists: an image folder, a tar, or a set of synthetic images."""

    source: str
    format: Literal["imagefolder", "webdataset", "procedural"]
    path: bytes
    """Path of the folder or tar, as bytes, because a file name need not be valid UTF-8."""
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
    """Outcome of an item that can't be read, such as missing or invalid_record; empty for a readable one."""
    detail: str = ""
    """Description of the problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemContent:
    """The encoded image and the raw caption of an item."""

    image: bytes
    caption: str


@contextmanager
def open_item(item: Item, roots: DataRoots) -> Iterator[ItemContent]:
    """Read an item from its files below `roots`, or draw it if it is synthetic.

    Its memory is reserved during the block; the call waits until it is free. Raises OSError or RefusedFileError.
    """
    if item.index >= 0:
        sample = draw_caption(item.seed, item.index, item.level)
        assert sample.image is not None, "every synthetic sample has an image"
        yield ItemContent(image=sample.image, caption=str(sample.meta["caption"]))
        return
    with open_data_file(item.path, roots) as file:
        size = item.size if item.size >= 0 else os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise RefusedFileError("too_large", f"larger than {format_bytes(MAX_FILE_BYTES)}")
        with FILE_MEMORY.reserve(size):
            image = read_part(file, item.path, roots, offset=item.offset, size=size)
            yield ItemContent(image=image, caption=_read_caption(item, roots))


def measure_item(item: Item) -> int:
    """Return the number of bytes of the encoded image; 0 for a synthetic one and for a file that can't be found."""
    if item.index >= 0 or item.size >= 0:
        return max(0, item.size)
    try:
        return os.stat(item.path).st_size
    except OSError:
        return 0


def read_item(item: Item, roots: DataRoots) -> ItemContent:
    """Read an item as `open_item` does, and reserve its memory only while it is read."""
    with open_item(item, roots) as content:
        return content


def _read_caption(item: Item, roots: DataRoots) -> str:
    if item.caption is not None or not item.caption_file:
        return item.caption or ""
    with open_data_file(item.caption_file, roots) as file:
        data = read_part(file, item.caption_file, roots, offset=0, size=MAX_TEXT_BYTES)
    return data.decode("utf-8", "replace")


def classify_file_error(error: OSError | RefusedFileError) -> tuple[str, str]:
    """Return outcome and detail for a file that can't be read. Raises the error if it is a failure of the storage."""
    if isinstance(error, RefusedFileError):
        advice = f"; {OUTSIDE_ADVICE}" if error.reason == "outside_root" else ""
        return REFUSED_OUTCOMES[error.reason], f"{error}{advice}"
    if error.errno not in FILE_ERRORS:
        raise error
    return "missing", os.strerror(error.errno or 0)


def build_problem_item(source: str, name: str, problem: str, detail: str) -> Item:
    """Build an item for a record that can't be read; its key is derived from `name`."""
    return Item(source=source, key=clean_key(name), problem=problem, detail=clean_text(detail)[:MAX_DETAIL_LENGTH])


def clean_key(name: str) -> str:
    """Replace dots, at which WebDataset splits names, slashes and other special characters by dashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-MAX_KEY_LENGTH:]


def get_suffix(name: str) -> str:
    """Return the last suffix of a file name in lower case, without its dot."""
    return Path(name).suffix.lower().removeprefix(".")
