"""Decode image files to upright RGB from any mode: CMYK, 16 bits, palette, transparency, animation, EXIF orientation.

Used by curation, the collate function, evaluation and the reports. Array suffixes: H, W: height and width in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # open_image checks its own limit and raises, where Pillow warns first
MAX_PIXELS = 178_956_970
"""Larger images are rejected from their header, before decoding, because they may be decompression bombs."""
ORIENTATION_TAG = 0x0112
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


class UnreadableImage(ValueError):  # noqa: N818  # reads better in a message
    """The bytes can't be decoded to a complete image."""


def read_size(data: bytes) -> tuple[int, int]:
    """Return the displayed width and height (EXIF orientation applied), reading the header only.

    Raises UnreadableImage.
    """
    with _translate_errors(), Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        return (height, width) if _read_orientation(image) >= 5 else (width, height)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame to upright RGB; transparent areas become white.

    Raises UnreadableImage if the image is incomplete or has more than `max_pixels` pixels.
    """
    with _translate_errors(), Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} exceeds the limit of {max_pixels} pixels")
        transpose = UPRIGHT_TRANSPOSES.get(_read_orientation(image))
        image.load()
        rgb = _to_rgb(image)
        return rgb if transpose is None else rgb.transpose(transpose)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise UnreadableImage for any error of a decoder; broken bytes cause OSError, struct.error and others."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(f"unreadable image: {error or type(error).__name__}") from error


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if EXIF is absent or broken."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  # broken EXIF, see the docstring
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values_HW: np.ndarray, mode: str) -> np.ndarray:
    """Scale 16-bit and floating-point grey values to 0..255 by their range instead of clipping them."""
    finite_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)
    white = _find_white_level(mode, float(finite_HW.max(initial=0.0)))
    return np.clip(finite_HW * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)


def _find_white_level(mode: str, maximum: float) -> float:
    """Return the value of white: fixed for 16-bit modes, else the smallest common range that holds the maximum."""
    if mode.startswith("I;16"):
        return 65535.0
    ranges = (255.0, 65535.0) if mode == "I" else (1.0, 255.0, 65535.0)
    return next((limit for limit in ranges if maximum <= limit), maximum)
