"""Verify one raw item: decode, measure and hash it, or return why it is dropped. Called by stage.py.

Nothing in an item's bytes is fatal. Only a failing storage raises an error.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.captions import classify_caption, clean_caption, clean_text
from sailvl_trainer.curate.dedup import hash_perceptually, hash_pixels
from sailvl_trainer.curate.items import Item, ItemContent, classify_file_error, read_item
from sailvl_trainer.data.images import UnreadableImage, choose_grid, count_tiles, open_image, read_size
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are accepted. No others, because Pillow would run Ghostscript for EPS."""
FORMAT_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}
"""File name suffix in a shard of the formats that differ from it. MPO, from phones, is a JPEG with further frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedItem:
    """Result of verification; the fields are columns of Parquet files."""

    outcome: str
    """ok, or the reason for which the item is dropped."""
    detail: str = ""
    """Description of the reason."""
    text: str = ""
    """Cleaned caption."""
    format: str = ""
    """File name suffix of the image's actual format, whatever its file is called."""
    width: int = 0
    height: int = 0
    """Size in pixels as displayed, with the EXIF orientation applied."""
    tiles: int = 0
    """Number of tiles in training, the thumbnail included."""
    pixels_sha256: str = ""
    """Hash of the size and of the decoded RGB pixels."""
    phash: int | None = None
    """Perceptual hash as a signed 64-bit integer; None for an image without structure."""


def verify_item(item: Item, config: CurateConfig, tile_size: int, roots: DataRoots) -> VerifiedItem:
    """Verify one item, whose files must be below `roots`. `tile_size`: side of a tile in pixels.

    Raises OSError if the storage fails.
    """
    if item.problem:
        return VerifiedItem(outcome=item.problem, detail=item.detail)
    try:
        content = read_item(item, roots)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        return VerifiedItem(outcome=outcome, detail=detail)
    caption = clean_caption(content.caption)
    outcome = classify_caption(caption)
    if outcome != "ok":
        return VerifiedItem(outcome=outcome, text=caption, detail=f"{len(caption)} characters")
    return _verify_image(content, caption, config, tile_size)


def _verify_image(content: ItemContent, caption: str, config: CurateConfig, tile_size: int) -> VerifiedItem:
    """Verify the image; its size is read from the header first, so that a decompression bomb is never decoded."""
    width = height = 0
    try:
        suffix = _read_format(content.image)
        width, height = read_size(content.image)
        outcome = _classify_size(width, height, config)
        if outcome != "ok":
            detail = f"{width} × {height} pixels"
            return VerifiedItem(outcome=outcome, text=caption, width=width, height=height, detail=detail)
        image = open_image(content.image, max_pixels=config.max_pixels)
    except UnreadableImage as error:
        return VerifiedItem(outcome="unreadable", text=caption, width=width, height=height, detail=_describe(error))
    return VerifiedItem(
        outcome="ok",
        text=caption,
        format=suffix,
        width=image.width,
        height=image.height,
        tiles=count_tiles(choose_grid(image.width, image.height, config.max_tiles, tile_size)),
        pixels_sha256=hash_pixels(image),
        phash=hash_perceptually(image),
    )


def _read_format(data: bytes) -> str:
    """Return the suffix of the image's format. Raises UnreadableImage for other formats and for broken checksums."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = str(image.format)
            image.verify()  # checks the checksums of a PNG; decoding ignores them and turns a flipped bit into noise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a supported format") from None
    except Exception as error:  # decoders raise many types of errors for broken bytes
        raise UnreadableImage(str(error)) from error
    return FORMAT_SUFFIXES.get(name, name.lower())


def _classify_size(width: int, height: int, config: CurateConfig) -> str:
    if width * height > config.max_pixels:
        return "too_large"
    return "too_small" if min(width, height) < config.min_side else "ok"


def _describe(error: UnreadableImage) -> str:
    """Return the decoder's message, without the object's address that some messages contain."""
    message = clean_text(str(error.__cause__ or error)).partition("<_io")[0].strip()[:200]
    return message or type(error.__cause__).__name__
