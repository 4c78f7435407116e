"""Builders of encoded images, intact and broken."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def draw_noise(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Draw a smooth random image, which has structure for a perceptual hash."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, format_: str, **options: Any) -> bytes:
    """Encode an image in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def build_exif(orientation: int) -> Image.Exif:
    """Build EXIF data with an orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def build_decompression_bomb() -> bytes:
    """Build a small PNG whose header declares 50,000 x 50,000 pixels."""
    header = _build_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    data = _build_chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + _build_chunk(b"IEND", b"")


def _build_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
