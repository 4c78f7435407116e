"""Encoded pictures as upright RGB, whatever their mode: CMYK, 16 bits, palettes, transparency, animations, EXIF."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # sizes are checked by the caller, before a pixel is decoded


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height as shown (EXIF applied), from the header alone. Raises OSError for what is no picture."""
    with Image.open(io.BytesIO(data)) as image:
        is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if is_turned else (image.width, image.height)


def open_image(data: bytes) -> Image.Image:
    """The first frame as RGB, upright, on white where it is transparent.

    Raises OSError (or ValueError, SyntaxError from broken headers) for what can't be decoded whole.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_eight_bits(np.asarray(image, dtype=np.float64))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values_HW: np.ndarray) -> np.ndarray:
    """16-bit pictures are scaled by their range, not cut off at 255."""
    scale = 257.0 if values_HW.max(initial=0) > 255 else 1.0
    return np.clip(values_HW / scale, 0, 255).astype(np.uint8)
