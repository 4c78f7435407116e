"""Perceptual hashes (pHash): alike for pictures that look alike; called by verify.py."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE, LOW = 32, 8
FLAT = 1.0
"""Grey levels of standard deviation; a flatter picture's frequencies are rounding noise, which says nothing."""


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits: the 8 × 8 lowest frequencies of the cosine transform of 32 × 32 grey pixels, above their median or not.

    As a signed integer, which Parquet and SQL hold; None for a picture without structure.
    """
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    grey_HW = np.asarray(small, dtype=np.float64)
    if grey_HW.std() < FLAT:
        return None
    low = (_DCT @ grey_HW @ _DCT.T)[:LOW, :LOW].ravel()
    # rounded: a frequency that is zero by symmetry must not fall to either side by the platform's last bit
    low = np.round(low, 6)
    return int(np.packbits(low > np.median(low[1:])).view(">i8")[0])


def distance(a: int, b: int) -> int:
    """Bits in which two hashes differ."""
    return ((a ^ b) & (2**64 - 1)).bit_count()


def _cosine_matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II."""
    k, i = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    matrix: np.ndarray = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _cosine_matrix(SIDE)
