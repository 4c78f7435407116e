"""Tiles of the vision tower: the choice of a grid, and cutting an image by it.

Tiling is dynamic as in InternVL2 (arXiv 2404.16821, §3): the grid with the closest aspect ratio, and a thumbnail.
Used by curation, the encoder (grids of many images at once), the collate function and evaluation.

Array suffixes: N tiles, for which H = W = image_size; S images, G grids.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from sailvl_trainer.data.images import resize_image
from sailvl_trainer.model.presets import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.array(IMAGENET_MEAN, dtype=np.float32), np.array(IMAGENET_STD, dtype=np.float32)
SCALE, SHIFT = 1.0 / (255.0 * STD), -MEAN / STD
"""(value / 255 - MEAN) / STD as one multiplication and one addition."""


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
    resized = resize_image(image, cols * size, rows * size)
    pixels_NHW3 = np.asarray(resized).reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if cols * rows > 1:
        thumbnail_HW3 = np.asarray(resize_image(image, size, size))
        pixels_NHW3 = np.concatenate([pixels_NHW3, thumbnail_HW3[None]])
    pixels_N3HW = np.empty((len(pixels_NHW3), 3, size, size), dtype=np.float32)
    for channel in range(3):
        np.multiply(pixels_NHW3[..., channel], SCALE[channel], out=pixels_N3HW[:, channel])
        pixels_N3HW[:, channel] += SHIFT[channel]
    return pixels_N3HW


@lru_cache(maxsize=32)
def _all_grids(max_tiles: int) -> np.ndarray:
    """Return the (columns, rows) of all grids with at most `max_tiles` tiles, in ascending size."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return np.array(sorted(grids, key=lambda g: (g[0] * g[1], g)), dtype=np.int64)
