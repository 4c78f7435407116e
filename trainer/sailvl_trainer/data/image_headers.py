"""Headers of encoded images: format, size, and the memory that decoding takes at its peak, without decoding.

The images are untrusted. Only a few formats are opened, and what Pillow would follow without a limit is checked before
(image_structure.py, image_tags.py). The orientation is found by image_orientation.py, the memory estimated by
image_peak_memory.py. Called by images.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from sailvl_trainer.data.image_memory import IMAGE_MEMORY
from sailvl_trainer.data.image_orientation import read_orientation
from sailvl_trainer.data.image_peak_memory import estimate_peak_bytes
from sailvl_trainer.data.image_structure import (
    PNG_SIGNATURE,
    ImageStructure,
    InvalidImage,
    check_blocks,
    count_scans,
    measure_chunks,
    measure_segments,
)
from sailvl_trainer.data.image_tags import check_tags

Image.MAX_IMAGE_PIXELS = None  # images.py checks its own limit and raises, where Pillow warns first
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are accepted everywhere. No others, because Pillow would run Ghostscript for EPS."""
UNRESERVED_BYTES = 1 << 20
"""Memory for metadata up to which a header is read without waiting for images that are being decoded."""


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
    """Read the header of an encoded image; the call waits until its memory is free. Raises InvalidImage."""
    structure = check_structure(data)
    if structure.metadata_bytes <= UNRESERVED_BYTES:
        return _read_header(data, structure)
    with IMAGE_MEMORY.reserve(structure.metadata_bytes):
        return _read_header(data, structure)


def _read_header(data: bytes, structure: ImageStructure) -> ImageHeader:
    with open_encoded(data) as image:
        orientation = read_orientation(image, data)
        width, height = image.size
        return ImageHeader(
            format=str(image.format),
            width=height if orientation >= 5 else width,
            height=width if orientation >= 5 else height,
            orientation=orientation,
            peak_bytes=estimate_peak_bytes(image, orientation, structure, len(data)),
        )


@contextmanager
def open_encoded(data: bytes) -> Iterator[Image.Image]:
    """Open an encoded image, which Pillow decodes when it is loaded. Raises InvalidImage for errors of the block."""
    with translate_errors(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        yield image


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise InvalidImage for any error of a decoder; broken bytes cause OSError, struct.error and others."""
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidImage(f"invalid image: not one of {', '.join(FORMATS)}") from None
    except InvalidImage:
        raise
    except Exception as error:
        raise InvalidImage(f"invalid image: {error or type(error).__name__}") from error


def check_structure(data: bytes) -> ImageStructure:
    """Check what Pillow reads without a limit. Raises InvalidImage."""
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
