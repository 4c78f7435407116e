"""Headers of encoded images: format, size, and the memory that decoding takes at its peak, without decoding.

The images are untrusted. Only a few formats are opened, and what Pillow would follow without a limit is checked before
(image_structure.py, image_tags.py). Pillow isn't asked for the orientation: it parses all EXIF data into objects, and
decodes a PNG without EXIF data to search behind the pixels. Called by images.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from sailvl_trainer.data.image_memory import IMAGE_MEMORY
from sailvl_trainer.data.image_structure import (
    PIXEL_CHUNKS,
    PNG_SIGNATURE,
    UnreadableImage,
    check_blocks,
    count_scans,
    iter_chunks,
    measure_chunks,
    measure_segments,
)
from sailvl_trainer.data.image_tags import ORIENTATION_TAG, UPRIGHT, check_tags, read_exif_orientation

Image.MAX_IMAGE_PIXELS = None  # images.py checks its own limit and raises, where Pillow warns first
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are accepted everywhere. No others, because Pillow would run Ghostscript for EPS."""
UNRESERVED_BYTES = 1 << 20
"""Memory for metadata up to which a header is read without waiting for images that are being decoded."""
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
TRAILING_CHUNKS = frozenset({b"eXIf", b"iTXt", b"tEXt", b"tRNS", b"zTXt"})
"""Chunks behind the pixels of a PNG that have a meaning for its decoding or its orientation."""
RAW_EXIF, PNG_XMP = "Raw profile type exif", "XML:com.adobe.xmp"
"""Names of texts of a PNG."""
_XMP_ORIENTATION = re.compile(r'tiff:Orientation(="|>)([0-9])')
_XMP_ORIENTATION_BYTES = re.compile(rb'tiff:Orientation(="|>)([0-9])')


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageStructure:
    """Properties of an image that are known before Pillow opens it."""

    scans: int = 0
    """Number of scans of a JPEG, 0 for other formats."""
    metadata_bytes: int = 0
    """Memory that Pillow takes for everything but the pixels, at most."""


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an encoded image; the call waits until its memory is free. Raises UnreadableImage."""
    structure = check_structure(data)
    if structure.metadata_bytes <= UNRESERVED_BYTES:
        return _read_header(data, structure)
    with IMAGE_MEMORY.reserve(structure.metadata_bytes):
        return _read_header(data, structure)


def _read_header(data: bytes, structure: ImageStructure) -> ImageHeader:
    with open_encoded(data) as image:
        orientation = _read_orientation(image, data)
        width, height = image.size
        return ImageHeader(
            format=str(image.format),
            width=height if orientation >= 5 else width,
            height=width if orientation >= 5 else height,
            orientation=orientation,
            peak_bytes=_estimate_peak_bytes(image, orientation, structure, len(data)),
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


def check_structure(data: bytes) -> ImageStructure:
    """Check what Pillow reads without a limit. Raises UnreadableImage."""
    if data.startswith(b"\xff\xd8"):
        return ImageStructure(scans=count_scans(data), metadata_bytes=measure_segments(data))
    if data.startswith(PNG_SIGNATURE):
        return ImageStructure(metadata_bytes=measure_chunks(data))
    if data.startswith(b"RIFF"):
        return ImageStructure(metadata_bytes=2 * len(data))  # WebP: the decoder has two copies of the file
    with translate_errors():
        if data[:4] in TiffImagePlugin.PREFIXES:
            return ImageStructure(metadata_bytes=check_tags(data))
        if data.startswith((b"GIF87a", b"GIF89a")):
            check_blocks(data)
    return ImageStructure()


def _read_orientation(image: Image.Image, data: bytes) -> int:
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


def _count_buffered_pixels(image: Image.Image) -> int:
    """Return the number of pixels of a strip or tile of a TIFF; a tile can be a million times as large as the image."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    if TILE_WIDTH_TAG in tags:
        return int(tags[TILE_WIDTH_TAG]) * int(tags[TILE_LENGTH_TAG])
    rows = min(image.height, int(tags.get(ROWS_PER_STRIP_TAG, image.height)))
    return image.width * rows


def _is_rotated_by_pillow(image: Image.Image) -> bool:
    """Return whether Pillow rotates the image when it is loaded, for which it takes the pixels twice."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return image.tag_v2.get(ORIENTATION_TAG, UPRIGHT) != UPRIGHT or "xmp" in image.info


def _estimate_peak_bytes(image: Image.Image, orientation: int, structure: ImageStructure, encoded_bytes: int) -> int:
    """Estimate the peak of decoding and of converting to RGB; tests hold it against the measured peak."""
    stored, decoder, copies = STORED_BYTES.get(image.mode, 4), 0, structure.metadata_bytes
    if image.format in ("JPEG", "MPO") and (structure.scans > 1 or "progressive" in image.info):
        decoder = 2 * len(image.getbands())  # coefficients of all scans
    elif image.format == "WEBP":
        decoder = WEBP_CANVAS_BYTES + WEBP_FRAME_BYTES
    elif image.format == "TIFF" and image.info.get("compression") != "raw":
        copies += encoded_bytes + TIFF_SAMPLE_BYTES * _count_buffered_pixels(image)
    if _is_rotated_by_pillow(image):
        decoder = stored
    is_rgb = image.mode == "RGB" and "transparency" not in image.info and image.format != "WEBP"
    converted = stored + (0 if is_rgb else RGB_BYTES) + (WEBP_CANVAS_BYTES if image.format == "WEBP" else 0)
    rotated = 2 * RGB_BYTES if orientation > 1 else RGB_BYTES
    grey = RGB_BYTES + 1  # for the perceptual hash
    per_pixel = max(stored + decoder, converted, rotated, grey)
    return WORKING_BYTES + copies + image.width * image.height * per_pixel
