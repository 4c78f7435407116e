"""HTML reports of curation and evaluation: self-contained pages in one style, with images as thumbnails in base64."""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any

import jinja2
from PIL import Image

from sailvl_trainer.data.image_structure import InvalidImage
from sailvl_trainer.data.images import open_image

THUMBNAIL_SIDE = 180
"""Longer side in pixels. Pages display thumbnails at half this size, to be sharp on high-resolution screens."""
MAX_PIXELS = 50_000_000
"""Larger images are not displayed, because decoding them takes too much memory for a report."""


def render_page(template: str, **values: Any) -> bytes:
    """Render a template that extends page.html.jinja. `template`: its path within the package sailvl_trainer.

    Raises jinja2.UndefinedError if the template uses a value that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sailvl_trainer", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()


def encode_thumbnail(data: bytes) -> str:
    """Return a small JPEG of an encoded image in base64, or an empty string if it can't be decoded."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about unusual metadata
            with open_image(data, max_pixels=MAX_PIXELS, resized_width=THUMBNAIL_SIDE) as image:
                image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
                image.save(buffer, "JPEG", quality=85)
    except InvalidImage:
        return ""
    return base64.b64encode(buffer.getvalue()).decode()
