"""Pictures small enough to stand in a report by the dozen."""

from __future__ import annotations

import base64
import io
import warnings

from PIL import Image

from sailvl_trainer.data.images import UnreadableImage, open_image

SIDE = 180
"""Pixels of the longer side; shown at half, which is sharp on every screen."""
MAX_PIXELS = 50_000_000
"""Larger ones are not shown: a report isn't worth their memory."""


def draw_thumbnail(data: bytes) -> str:
    """A JPEG in base64; empty for what can't be shown, which a report must not fail of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of metadata
            image = open_image(data, max_pixels=MAX_PIXELS)
    except UnreadableImage:
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
