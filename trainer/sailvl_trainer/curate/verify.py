"""Verify one raw item: decode, measure and hash it, or return why it is dropped. Called by stage.py.

Nothing in an item's bytes is fatal. Only a failing storage raises an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.captions import classify_caption, clean_caption, clean_text
from sailvl_trainer.curate.dedup import PHASH_SIDE, hash_perceptually, hash_pixels
from sailvl_trainer.curate.items import Item, ItemContent, classify_file_error, open_item
from sailvl_trainer.data.image_headers import ImageHeader, open_encoded, read_header
from sailvl_trainer.data.image_memory import IMAGE_MEMORY
from sailvl_trainer.data.image_structure import ImageTooLarge, InvalidImage
from sailvl_trainer.data.images import open_image
from sailvl_trainer.data.tiles import choose_grid, count_tiles
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError

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
        with open_item(item, roots) as content:
            return _verify_content(content, config, tile_size)
    except (OSError, RefusedFileError) as error:
        outcome, detail = classify_file_error(error)
        return VerifiedItem(outcome=outcome, detail=detail)


def _verify_content(content: ItemContent, config: CurateConfig, tile_size: int) -> VerifiedItem:
    caption = clean_caption(content.caption)
    outcome = classify_caption(caption)
    if outcome != "ok":
        return VerifiedItem(outcome=outcome, text=caption, detail=f"{len(caption)} characters")
    header = None
    try:
        header = read_header(content.image)
        outcome = _classify_size(header, config)
        if outcome != "ok":
            return _drop(outcome, caption, f"{header.width} × {header.height} pixels", header)
        if header.format == "PNG":
            _check_checksums(content.image)
        with open_image(content.image, max_pixels=config.max_pixels, resized_width=PHASH_SIDE) as image:
            return _measure(image, caption, header, config, tile_size)
    except ImageTooLarge as error:
        return _drop("too_large", caption, str(error), header)
    except InvalidImage as error:
        return _drop("invalid_image", caption, _describe(error), header)


def _measure(
    image: Image.Image, caption: str, header: ImageHeader, config: CurateConfig, tile_size: int
) -> VerifiedItem:
    return VerifiedItem(
        outcome="ok",
        text=caption,
        format=FORMAT_SUFFIXES.get(header.format, header.format.lower()),
        width=image.width,
        height=image.height,
        tiles=count_tiles(choose_grid(image.width, image.height, config.max_tiles, tile_size)),
        pixels_sha256=hash_pixels(image),
        phash=hash_perceptually(image),
    )


def _drop(outcome: str, caption: str, detail: str, header: ImageHeader | None) -> VerifiedItem:
    width, height = (header.width, header.height) if header is not None else (0, 0)
    return VerifiedItem(outcome=outcome, text=caption, width=width, height=height, detail=detail)


def _check_checksums(data: bytes) -> None:
    """Check the checksums of a PNG: decoding ignores them, and turns a flipped bit into noise."""
    with IMAGE_MEMORY.reserve(2 * len(data)), open_encoded(data) as image:  # Pillow copies each chunk
        image.verify()


def _classify_size(header: ImageHeader, config: CurateConfig) -> str:
    """Return the outcome by the size in the header, so that a decompression bomb is never decoded."""
    if header.width * header.height > config.max_pixels:
        return "too_large"
    return "too_small" if min(header.width, header.height) < config.min_side else "ok"


def _describe(error: InvalidImage) -> str:
    """Return the decoder's message, without the object's address that some messages contain."""
    message = clean_text(str(error.__cause__ or error)).partition("<_io")[0].strip()[:200]
    return message or type(error.__cause__).__name__
