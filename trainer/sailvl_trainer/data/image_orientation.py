"""The orientation of an encoded image, from EXIF data or XMP, wherever decoding would find it.

Pillow isn't asked for it: it parses all EXIF data into objects, and decodes a PNG without EXIF data to search behind
the pixels. Called by image_headers.py.
"""

from __future__ import annotations

import re

from PIL import Image, PngImagePlugin

from sailvl_trainer.data.image_structure import PIXEL_CHUNKS, iter_chunks
from sailvl_trainer.data.image_tags import UPRIGHT, read_exif_orientation

TRAILING_CHUNKS = frozenset({b"eXIf", b"iTXt", b"tEXt", b"tRNS", b"zTXt"})
"""Chunks behind the pixels of a PNG that have a meaning for its decoding or its orientation."""
RAW_EXIF, PNG_XMP = "Raw profile type exif", "XML:com.adobe.xmp"
"""Names of texts of a PNG."""
_XMP_ORIENTATION = re.compile(r'tiff:Orientation(="|>)([0-9])')
_XMP_ORIENTATION_BYTES = re.compile(rb'tiff:Orientation(="|>)([0-9])')


def read_orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if EXIF is absent or broken, or if Pillow applies it."""
    if image.format == "TIFF":
        return UPRIGHT
    try:
        orientation = _find_orientation(image, data)
    except Exception:  # noqa: BLE001  # broken EXIF, see the docstring
        return UPRIGHT
    return orientation if 1 <= orientation <= 8 else UPRIGHT


def _find_orientation(image: Image.Image, data: bytes) -> int:
    """Return the orientation in EXIF data, or if it has none, in XMP."""
    exif = image.info.get("exif")
    if isinstance(image, PngImagePlugin.PngImageFile):
        _read_trailing_chunks(image, data)
        exif = image.info.get("exif") if exif is None else exif
        if exif is None and RAW_EXIF in image.info:
            exif = _parse_raw_exif(image.info[RAW_EXIF])
    orientation = None if exif is None else read_exif_orientation(exif)
    return _read_xmp_orientation(image) if orientation is None else orientation


def _read_trailing_chunks(image: PngImagePlugin.PngImageFile, data: bytes) -> None:
    """Add the chunks behind the pixels to the image's info, as decoding would."""
    assert image.png is not None
    assert image.fp is not None
    is_behind_pixels = False
    for chunk in iter_chunks(data):
        if chunk.name == b"fcTL" and is_behind_pixels and image.is_animated:
            return  # the next frame
        is_behind_pixels |= chunk.name in PIXEL_CHUNKS
        if is_behind_pixels and chunk.name in TRAILING_CHUNKS:
            image.fp.seek(chunk.position)
            image.png.call(chunk.name, chunk.position, chunk.size)


def _parse_raw_exif(text: str) -> bytes:
    """Return the EXIF data of a text by ImageMagick: three lines, and lines of hexadecimal digits."""
    lines = text.split("\n", 3)
    return bytes.fromhex(lines[3].replace("\n", "")) if len(lines) > 3 else b""


def _read_xmp_orientation(image: Image.Image) -> int:
    text, data = image.info.get(PNG_XMP), image.info.get("xmp")
    if text:
        found = _XMP_ORIENTATION.search(text)
        return int(found[2]) if found else UPRIGHT
    match = _XMP_ORIENTATION_BYTES.search(data) if data else None
    return int(match[2]) if match else UPRIGHT
