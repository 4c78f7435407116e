"""The memory that decoding an image to upright RGB takes at its peak, estimated from what is known before.

Tests hold the estimate against the measured peak. Called by image_headers.py.
"""

from __future__ import annotations

from PIL import Image, TiffImagePlugin

from sailvl_trainer.data.image_structure import ImageStructure
from sailvl_trainer.data.image_tags import ORIENTATION_TAG, UPRIGHT

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


def estimate_peak_bytes(image: Image.Image, orientation: int, structure: ImageStructure, encoded_bytes: int) -> int:
    """Estimate the peak of decoding and of converting to RGB, without the encoded bytes."""
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
