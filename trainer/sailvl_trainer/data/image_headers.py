"""Headers of encoded images: format, size, and the memory that decoding takes at its peak, without decoding.

The images are untrusted. Only a few formats are opened, and what Pillow would follow without a limit is checked before:
scans of a JPEG, each of which is a pass over all pixels, and tags of a TIFF, of which each value becomes an object.
Called by images.py.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = None  # images.py checks its own limit and raises, where Pillow warns first
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are accepted everywhere. No others, because Pillow would run Ghostscript for EPS."""
MAX_SCANS = 100
"""Maximum number of scans of a JPEG; encoders write about ten into a progressive one."""
MAX_TAG_VALUES = 1 << 20
"""Maximum number of values of a numeric tag of a TIFF, such as the offsets of its strips."""
ORIENTATION_TAG = 0x0112
WORKING_BYTES = 16 << 20
"""Memory for buffers that don't depend on the size of an image, such as the strips of images.py."""
STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes per pixel of the modes that Pillow doesn't store in 4 bytes."""
RGB_BYTES = 4
WEBP_CANVAS_BYTES, WEBP_FRAME_BYTES = 8, 4
"""Bytes per pixel of the two canvases of the decoder, and of the frame that it returns."""
TIFF_SAMPLE_BYTES = 8
"""Bytes per pixel of a buffered strip or tile of a compressed TIFF: at most 4 samples of 16 bits."""
TILE_WIDTH_TAG, TILE_LENGTH_TAG, ROWS_PER_STRIP_TAG = 322, 323, 278
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_STANDALONE_MARKERS = (0x01, 0xD8)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_NUMERIC_TYPES = frozenset({3, 4, 5, 8, 9, 10, 11, 12, 13, 16, 17, 18})


class UnreadableImage(ValueError):  # noqa: N818  # reads better in a message
    """The bytes can't be decoded to a complete image."""


class ImageTooLarge(UnreadableImage):
    """The image exceeds the limit of pixels or the rank's memory for images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """Properties of an image that are read without decoding it."""

    format: str
    """One of FORMATS, or MPO for a JPEG with further frames."""
    width: int
    """Width as displayed, with the EXIF orientation applied."""
    height: int
    """Height as displayed."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    peak_bytes: int
    """Estimated peak of the memory that decoding to upright RGB takes, without the encoded bytes."""


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an encoded image. Raises UnreadableImage."""
    scans = check_structure(data)
    with open_encoded(data) as image:
        orientation = _read_orientation(image)
        width, height = image.size
        return ImageHeader(
            format=str(image.format),
            width=height if orientation >= 5 else width,
            height=width if orientation >= 5 else height,
            orientation=orientation,
            peak_bytes=_estimate_peak_bytes(image, orientation, scans, len(data)),
        )


@contextmanager
def open_encoded(data: bytes) -> Iterator[Image.Image]:
    """Open an encoded image, which Pillow decodes when it is loaded. Raises UnreadableImage for errors of the block."""
    with translate_errors(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        yield image


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise UnreadableImage for any error of a decoder; broken bytes cause OSError, struct.error and others."""
    try:
        yield
    except UnidentifiedImageError:
        raise UnreadableImage(f"unreadable image: not one of {', '.join(FORMATS)}") from None
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"unreadable image: {error or type(error).__name__}") from error


def check_structure(data: bytes) -> int:
    """Return the number of scans of a JPEG, 0 for other formats.

    Raises UnreadableImage for more than MAX_SCANS, and for a TIFF with a tag of more than MAX_TAG_VALUES values.
    """
    if data[:2] == b"\xff\xd8":
        return _count_scans(data)
    if data[:4] in TiffImagePlugin.PREFIXES:
        with translate_errors():
            _check_tags(data)
    return 0


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG by walking its segments up to the end of the image; thumbnails are in segments."""
    position, scans = 2, 0
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker in _STANDALONE_MARKERS:
            continue
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise UnreadableImage(f"JPEG with more than {MAX_SCANS} scans")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


def _check_tags(data: bytes) -> None:
    """Check the first directory of a TIFF; Pillow reads no other."""
    order, is_big = ("<" if data[:2] == b"II" else ">"), 43 in data[2:4]
    count_format, entry_format = ("Q", "HHQ8x") if is_big else ("H", "HHL4x")
    (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'L'}", data, 8 if is_big else 4)
    (entries,) = struct.unpack_from(order + count_format, data, start)
    if entries > 65535:
        raise UnreadableImage(f"TIFF with {entries} tags")
    start += struct.calcsize(order + count_format)
    size = struct.calcsize(order + entry_format)
    for tag, kind, count in struct.iter_unpack(order + entry_format, data[start : start + entries * size]):
        if kind in _NUMERIC_TYPES and count > MAX_TAG_VALUES:
            raise UnreadableImage(f"TIFF whose tag {tag} has {count} values")


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if EXIF is absent or broken, or if Pillow applies it."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  # broken EXIF, see the docstring
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _count_buffered_pixels(image: Image.Image) -> int:
    """Return the number of pixels of a strip or tile of a TIFF; a tile can be a million times as large as the image."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    if TILE_WIDTH_TAG in tags:
        return int(tags[TILE_WIDTH_TAG]) * int(tags[TILE_LENGTH_TAG])
    rows = min(image.height, int(tags.get(ROWS_PER_STRIP_TAG, image.height)))
    return image.width * rows


def _estimate_peak_bytes(image: Image.Image, orientation: int, scans: int, encoded_bytes: int) -> int:
    """Estimate the peak of decoding and of converting to RGB; tests hold it against the measured peak."""
    stored, decoder, copies = STORED_BYTES.get(image.mode, 4), 0, 0
    if image.format in ("JPEG", "MPO") and (scans > 1 or "progressive" in image.info):
        decoder = 2 * len(image.getbands())  # coefficients of all scans
    elif image.format == "WEBP":
        decoder, copies = WEBP_CANVAS_BYTES + WEBP_FRAME_BYTES, encoded_bytes
    elif image.format == "TIFF" and image.info.get("compression") != "raw":
        copies = encoded_bytes + TIFF_SAMPLE_BYTES * _count_buffered_pixels(image)
    is_rgb = image.mode == "RGB" and "transparency" not in image.info and image.format != "WEBP"
    converted = stored + (0 if is_rgb else RGB_BYTES) + (WEBP_CANVAS_BYTES if image.format == "WEBP" else 0)
    rotated = 2 * RGB_BYTES if orientation > 1 else RGB_BYTES
    grey = RGB_BYTES + 1  # for the perceptual hash
    per_pixel = max(stored + decoder, converted, rotated, grey)
    return WORKING_BYTES + copies + image.width * image.height * per_pixel
