"""Images as tiles: decode files to upright RGB from any mode, and cut them into the tiles of the vision tower.

Modes: CMYK, 16 bits, palette, transparency, animation, EXIF orientation. Tiling is dynamic as in InternVL2 (arXiv
2404.16821, §3): the grid with the closest aspect ratio, and a thumbnail. Used by curation, the encoder (grids of many
images at once), the collate function, evaluation and the reports.

Array suffixes: H, W: height and width in pixels; N tiles, for which H = W = image_size; S images, G grids.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import Image

from sailvl_trainer.model.presets import IMAGENET_MEAN, IMAGENET_STD

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
MEAN, STD = np.array(IMAGENET_MEAN, dtype=np.float32), np.array(IMAGENET_STD, dtype=np.float32)
SCALE, SHIFT = 1.0 / (255.0 * STD), -MEAN / STD
"""(value / 255 - MEAN) / STD as one multiplication and one addition."""


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


def choose_grid(width: int, height: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """Return columns and rows of the grid with the closest aspect ratio.

    On a tie, the larger grid wins if the image fills at least half of it.
    """
    cols_S, rows_S = choose_grids(np.array([width]), np.array([height]), max_tiles, image_size)
    return int(cols_S[0]), int(rows_S[0])


def choose_grids(
    width_S: np.ndarray, height_S: np.ndarray, max_tiles: int, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `choose_grid` of many images: columns and rows, each of shape (S,)."""
    grids_G2 = _all_grids(max_tiles)
    ratio_S = width_S / np.maximum(height_S, 1)
    area_S = width_S.astype(np.int64) * height_S
    best_S = np.zeros(len(width_S), dtype=np.int64)
    gap_S = np.full(len(width_S), np.inf)
    for number, (cols, rows) in enumerate(grids_G2.tolist()):
        distance_S = np.abs(ratio_S - cols / rows)
        is_filled_S = area_S > 0.5 * image_size**2 * cols * rows
        is_better_S = (distance_S < gap_S) | ((distance_S == gap_S) & is_filled_S)
        best_S[is_better_S] = number
        gap_S = np.minimum(gap_S, distance_S)
    return grids_G2[best_S, 0], grids_G2[best_S, 1]


def count_tiles(grid: tuple[int, int]) -> int:
    """Return the number of tiles of a grid; more than one tile is followed by a thumbnail."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if tiles > 1 else tiles


def cut_tiles(image: Image.Image, grid: tuple[int, int], image_size: int) -> np.ndarray:
    """Return an image's tiles row by row, the thumbnail last; float32 (N, 3, H, W), normalised as ImageNet."""
    cols, rows = grid
    size = image_size
    resized = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    pixels_NHW3 = np.asarray(resized).reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if cols * rows > 1:
        thumbnail_HW3 = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        pixels_NHW3 = np.concatenate([pixels_NHW3, thumbnail_HW3[None]])
    pixels_N3HW = np.empty((len(pixels_NHW3), 3, size, size), dtype=np.float32)
    for channel in range(3):
        np.multiply(pixels_NHW3[..., channel], SCALE[channel], out=pixels_N3HW[:, channel])
        pixels_N3HW[:, channel] += SHIFT[channel]
    return pixels_N3HW


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


@lru_cache(maxsize=32)
def _all_grids(max_tiles: int) -> np.ndarray:
    """Return the (columns, rows) of all grids with at most `max_tiles` tiles, in ascending size."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return np.array(sorted(grids, key=lambda g: (g[0] * g[1], g)), dtype=np.int64)
