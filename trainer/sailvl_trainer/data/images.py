"""Encoded pictures as upright RGB, whatever their mode: CMYK, 16 bits, palettes, transparency, animations, EXIF.

Called by curation, by collate and by evaluation. Suffixes: H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # `open_image` has its own limit, an error at once rather than a warning before it
MAX_PIXELS = 178_956_970
"""Above it a picture is refused by its header, undecoded: a decompression bomb."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what shows it upright."""


class UnreadableImage(ValueError):  # noqa: N818  # reads better in a message
    """Bytes that can't be decoded to a whole picture."""


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height as shown (EXIF applied), from the header alone. Raises UnreadableImage."""
    with _reading(), Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame as RGB, upright, on white where it is transparent.

    Raises UnreadableImage for what can't be decoded whole, or has more than `max_pixels`.
    """
    with _reading(), Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} are more than {max_pixels} pixels")
        turn = TURNS.get(_orientation(image))
        image.load()
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _reading() -> Iterator[None]:
    """One error for all that decoders raise on broken bytes, from OSError to struct.error and IndexError."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(f"no readable picture: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """1 to 8; broken EXIF doesn't make a picture unreadable, it is then shown as it lies."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # as above
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values_HW: np.ndarray, mode: str) -> np.ndarray:
    """Deep grey pictures scaled by their range, not cut off at 255."""
    finite_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)
    full = _full_scale(mode, float(finite_HW.max(initial=0.0)))
    return np.clip(finite_HW * (255.0 / full) + 0.5, 0, 255).astype(np.uint8)


def _full_scale(mode: str, most: float) -> float:
    """What is white: given by the type for 16 bits, else the smallest usual range that holds the values."""
    if mode.startswith("I;16"):
        return 65535.0
    ranges = (255.0, 65535.0) if mode == "I" else (1.0, 255.0, 65535.0)
    return next((limit for limit in ranges if most <= limit), most)
