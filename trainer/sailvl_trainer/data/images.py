"""Images: untrusted files are decoded to upright RGB, within the pixel limit and the memory budget of the rank.

Modes: CMYK, 16 bits, palette, transparency, animation (the first frame), EXIF orientation. Large images are converted
in strips. Used by curation, the collate function, evaluation and the reports; tiles.py cuts the result into tiles.

Array suffixes: H, W: height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from sailvl_trainer.data.image_headers import ImageHeader, open_encoded, read_header
from sailvl_trainer.data.image_memory import IMAGE_MEMORY
from sailvl_trainer.data.image_peak_memory import RGB_BYTES
from sailvl_trainer.data.image_structure import ImageTooLarge
from sailvl_trainer.storage.files import format_bytes

MAX_PIXELS = 178_956_970
"""Larger images are rejected from their header, before decoding, because they may be decompression bombs."""
MAX_IMAGE_BYTES = 4 << 30
"""Images whose decoding takes more memory, as estimated from their header, are rejected on every machine."""
MAX_RESIZE_BYTES = 256 << 20
"""Pillow resizes horizontally first. A high and narrow image would need more than this; it is resized vertically
first."""
STRIP_PIXELS = 1 << 18
"""Number of pixels that are converted at once."""
COEFFICIENT_BYTES = 64
"""Memory of Pillow's filter per column and row of the image that is resized, at most."""
UPRIGHT_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transpose that makes the image upright."""


def read_size(data: bytes) -> tuple[int, int]:
    """Return the displayed width and height (EXIF orientation applied), reading the header only.

    Raises InvalidImage.
    """
    header = read_header(data)
    return header.width, header.height


@contextmanager
def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, resized_width: int = 0) -> Iterator[Image.Image]:
    """Decode the first frame to upright RGB; transparent areas become white.

    The memory for the image, and for resizing it to `resized_width`, is reserved during the block; the call waits until
    it is free. An image that needs more than all images may take is decoded alone. Raises InvalidImage if the image
    is incomplete, and ImageTooLarge if it has more than `max_pixels` pixels or needs more than MAX_IMAGE_BYTES.
    """
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise ImageTooLarge(f"{header.width} x {header.height} exceeds the limit of {max_pixels} pixels")
    if header.peak_bytes > MAX_IMAGE_BYTES:
        needed, limit = format_bytes(header.peak_bytes), format_bytes(MAX_IMAGE_BYTES)
        raise ImageTooLarge(
            f"{header.width} x {header.height} pixels need {needed} to decode, more than the limit of {limit}; "
            "reduce the image or write it in another format"
        )
    with IMAGE_MEMORY.reserve(header.peak_bytes + _estimate_resize_bytes(header, resized_width)):
        yield _decode(data, header.orientation)


def resize_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image with Pillow's bicubic filter."""
    if width > image.width and width * image.height * RGB_BYTES > MAX_RESIZE_BYTES:
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _estimate_resize_bytes(header: ImageHeader, width: int) -> int:
    """Estimate the memory for resizing: the rows in their new width, and the coefficients of Pillow's filter."""
    rows_bytes = width * header.height * RGB_BYTES
    if width > header.width:
        rows_bytes = min(rows_bytes, MAX_RESIZE_BYTES)
    return rows_bytes + (COEFFICIENT_BYTES * (header.width + header.height) if width else 0)


def _decode(data: bytes, orientation: int) -> Image.Image:
    with open_encoded(data) as image:
        image.load()
        rgb = _to_rgb(image)
        if rgb is not image:
            image.close()  # frees its pixels before the transpose
        transpose = UPRIGHT_TRANSPOSES.get(orientation)
        rgb = rgb if transpose is None else rgb.transpose(transpose)
        rgb.info = {}
        return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB: in strips, so that only the result has the size of the image."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.format == "WEBP" else image  # the copy releases the decoder with its canvases
    convert = _choose_conversion(image)
    if image.width * image.height <= STRIP_PIXELS:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for strip, top in _iter_strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _iter_strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Yield strips of at most STRIP_PIXELS pixels, or of one row, each with the number of its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(image.height, top + rows))), top


def _choose_conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the function that converts a strip of the image to RGB."""
    if image.mode.startswith("I;16"):
        return _convert_sixteen_bits
    if image.mode in ("I", "F"):
        white = _find_white_level(image)
        return lambda strip: Image.fromarray(_scale(_read_finite(strip), white)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _blend_with_white
    return lambda strip: strip.convert("RGB")


def _blend_with_white(strip: Image.Image) -> Image.Image:
    layer = strip.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _convert_sixteen_bits(strip: Image.Image) -> Image.Image:
    return Image.fromarray(_SIXTEEN_TO_EIGHT_BITS[np.asarray(strip)]).convert("RGB")


def _read_finite(strip: Image.Image) -> np.ndarray:
    """Return the values as float64, with zeros in the place of NaN and infinities."""
    values_HW: np.ndarray = np.nan_to_num(np.asarray(strip).astype(np.float64), posinf=0.0, neginf=0.0)
    return values_HW


def _scale(values_HW: np.ndarray, white: float) -> np.ndarray:
    """Scale grey values to 0..255 by their range instead of clipping them."""
    scaled_HW: np.ndarray = np.clip(values_HW * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    return scaled_HW


def _find_white_level(image: Image.Image) -> float:
    """Return the value of white: the smallest common range that holds the maximum."""
    maximum = max(float(_read_finite(strip).max(initial=0.0)) for strip, _ in _iter_strips(image))
    ranges = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
    return next((limit for limit in ranges if maximum <= limit), maximum)


_SIXTEEN_TO_EIGHT_BITS = _scale(np.arange(65536, dtype=np.float64), 65535.0)
"""Grey level of each 16-bit value."""
