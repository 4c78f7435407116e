"""One raw item to one row: decoded or rejected with the reason, measured and hashed. Nothing in a file is fatal."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.captions import clean_caption, judge_caption
from sailvl_trainer.curate.items import Item, Raw, clean_text, read_item
from sailvl_trainer.curate.phash import perceptual_hash
from sailvl_trainer.data.images import UnreadableImage, open_image, read_size
from sailvl_trainer.data.tiling import choose_grid, count_tiles

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read. No others: Pillow would run Ghostscript for EPS."""
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}
"""Format to its suffix in a shard, where that is not its name; MPO is a JPEG with more after it, from phones."""
MAX_BYTES = 256 << 20
"""Of an encoded picture."""
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP})
"""A file that isn't there or isn't ours is counted. Any other failure to read is the storage's, and ends the rank:
else an outage would quietly thin the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What verification found; `outcome` is ok, or why the item is dropped."""

    outcome: str
    detail: str = ""
    """The reason in words."""
    text: str = ""
    """The clean caption."""
    format: str = ""
    """Suffix of the picture's true format, whatever its file is called."""
    width: int = 0
    height: int = 0
    """As shown: turned by EXIF."""
    tiles: int = 0
    pixels_sha256: str = ""
    """Of the decoded RGB pixels and the size."""
    phash: int | None = None
    """64 bits as a signed integer; None: no structure to compare."""


def verify(item: Item, config: CurateConfig, tile_size: int) -> Verified:
    """Check one item. Raises OSError when the storage fails."""
    if item.problem:
        return Verified(outcome=item.problem, detail=item.detail)
    try:
        if item.index < 0 and _stored_bytes(item) > MAX_BYTES:
            return Verified(outcome="too_large", detail=f"more than {MAX_BYTES >> 20} MiB")
        raw = read_item(item)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return Verified(outcome="missing", detail=os.strerror(error.errno or 0))
    caption = clean_caption(raw.caption)
    outcome = judge_caption(caption)
    if outcome != "ok":
        return Verified(outcome=outcome, text=caption, detail=f"{len(caption)} characters")
    return _verify_picture(raw, caption, config, tile_size)


def _stored_bytes(item: Item) -> int:
    return item.size if item.size >= 0 else os.stat(item.path).st_size


def _verify_picture(raw: Raw, caption: str, config: CurateConfig, tile_size: int) -> Verified:
    """The size comes from the header, so that a decompression bomb is never decoded."""
    width = height = 0
    try:
        suffix = _read_format(raw.data)
        width, height = read_size(raw.data)
        outcome = _judge_size(width, height, config)
        if outcome != "ok":
            words = f"{width} × {height} pixels"
            return Verified(outcome=outcome, text=caption, width=width, height=height, detail=words)
        image = open_image(raw.data, max_pixels=config.max_pixels)
    except UnreadableImage as error:
        return Verified(outcome="unreadable", text=caption, width=width, height=height, detail=_explain(error))
    return Verified(
        outcome="ok",
        text=caption,
        format=suffix,
        width=image.width,
        height=image.height,
        tiles=count_tiles(choose_grid(image.width, image.height, config.max_tiles, tile_size)),
        pixels_sha256=hash_pixels(image),
        phash=perceptual_hash(image),
    )


def _read_format(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = str(image.format)
            image.verify()  # the checksums of a PNG, which decoding passes over: a flipped bit would become noise
    except UnidentifiedImageError:
        raise UnreadableImage("no picture of a known format") from None
    except Exception as error:  # decoders raise anything on broken bytes; all of it means the same
        raise UnreadableImage(str(error)) from error
    return SUFFIXES.get(name, name.lower())


def _judge_size(width: int, height: int, config: CurateConfig) -> str:
    if width * height > config.max_pixels:
        return "too_large"
    return "too_small" if min(width, height) < config.min_side else "ok"


def hash_pixels(image: Image.Image) -> str:
    """SHA-256 of size and pixels: equal for the same picture in another format, key or folder."""
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()


def _explain(error: UnreadableImage) -> str:
    """A decoder's words, without the address of an object that some hold."""
    words = clean_text(str(error.__cause__ or error)).partition("<_io")[0].strip()[:200]
    return words or type(error.__cause__).__name__
